//! Images that are saved: what is opened again is walked as what was saved.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use pagewalk_proto::v1;
use pagewalk_proto::v1::save_image_response::Part;
use pagewalkd::machine::image::Description;
use tonic::Code;

use crate::bed::{Bed, access, fault, nested_off, nested_on, number, page, read, refusal};

/// Saves `machine` into the folder, and gives its description.
async fn save(bed: &Bed, machine: &str, folder: &Path) -> String {
    let request = v1::SaveImageRequest { machine: machine.to_owned(), memory_file: String::new() };
    let mut parts = bed.machines().save_image(request).await.unwrap().into_inner();
    let memory = File::create(folder.join("memory.bin")).unwrap();
    let mut description = String::new();
    while let Some(part) = parts.message().await.unwrap() {
        match part.part.unwrap() {
            Part::Start(start) => {
                memory.set_len(start.memory_file_bytes).unwrap();
                std::fs::write(folder.join("image.toml"), &start.description).unwrap();
                description = start.description;
            }
            Part::Piece(piece) => memory.write_all_at(&piece.contents, piece.offset).unwrap(),
            Part::End(_) => return description,
        }
    }
    panic!("the image has no end");
}

async fn attach(bed: &Bed, id: &str, folder: &Path) {
    let spec = format!("{id}=image:{}", folder.join("image.toml").display());
    bed.machines().attach_machine(v1::AttachMachineRequest { spec }).await.unwrap();
}

fn of(machine: &str) -> Option<v1::VcpuRef> {
    Some(v1::VcpuRef { machine: machine.to_owned(), vcpu: 0 })
}

/// The nested mode of vCPU 0, and both walkers.
async fn state(bed: &Bed, machine: &str) -> v1::GetWalkerStateResponse {
    let request = v1::GetWalkerStateRequest { vcpu: of(machine), ..Default::default() };
    let answer = bed.walker().get_walker_state(request).await.unwrap().into_inner();
    v1::GetWalkerStateResponse { provenance: None, ..answer }
}

/// What both dimensions say: of every landmark, of addresses in between, and of nGPAs.
async fn said(bed: &Bed, machine: &str) -> Vec<String> {
    let mut said = Vec::new();
    let landmarks = bed.machine.source().landmarks();
    for gva in landmarks.iter().flat_map(|l| [l.address, l.address.wrapping_add(0x1008)]) {
        let request = v1::TranslateRequest { vcpu: of(machine), trace: true, ..read(gva) };
        let answer = bed.translate(request).await.unwrap();
        said.push(format!("{gva:#x}: {:?} {:?}", answer.outcome, answer.steps));
    }
    for page in 0..512 {
        let request = v1::TranslateNestedGpaRequest {
            vcpu: of(machine),
            address: number(page << 12),
            access: access(v1::AccessKind::Write, v1::Privilege::User),
            trace: true,
            ..Default::default()
        };
        let answer = bed.translation().translate_nested_gpa(request).await.unwrap().into_inner();
        said.push(format!("{page:#x}: {:?} {:?}", answer.outcome, answer.steps));
    }
    said
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_saved_in_nested_mode_has_both_dimensions() {
    let bed = Bed::plain().await;
    let (data, own) = (bed.landmark("l2-data"), said(&bed, "demo").await);
    let off = state(&bed, "demo").await;
    bed.walker().set_nested_mode(nested_on()).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let description = save(&bed, "demo", folder.path()).await;
    assert!(description.contains("[vcpu.nested.npt]") && description.contains("[vcpu.nested.l2]"));
    attach(&bed, "copy", folder.path()).await;

    let nested = said(&bed, "demo").await;
    assert_ne!(nested, own);
    assert_eq!(said(&bed, "copy").await, nested);
    assert_eq!(state(&bed, "copy").await, state(&bed, "demo").await);
    let answer = bed.translate(v1::TranslateRequest { vcpu: of("copy"), ..read(data) }).await.unwrap();
    assert_eq!((page(&answer).gpa, page(&answer).nested_gpa), (0x61_1000, Some(0x1_1000)));

    // It lies over the walkers, and is taken away as it could be where it was saved.
    let request = v1::SetNestedModeRequest { vcpu: of("copy"), ..nested_off() };
    bed.walker().set_nested_mode(request).await.unwrap();
    assert_eq!(said(&bed, "copy").await, own);
    assert_eq!(state(&bed, "copy").await, off);
    bed.stop().await;
}

/// The vCPU's registers are L2's, as where KVM runs one.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_a_vcpu_in_guest_mode_is_of_its_l2() {
    let bed = Bed::plain().await;
    bed.walker().set_nested_mode(nested_on()).await.unwrap();
    let nested = said(&bed, "demo").await;
    let folder = tempfile::tempdir().unwrap();
    let description = save(&bed, "demo", folder.path()).await;
    let (own, l2) = description.split_once("\n[vcpu.nested.l2]\n").unwrap();
    let l2 = l2.lines().next().unwrap();
    assert!(l2.starts_with("cr3 = "), "{l2}");
    let own = own.lines().map(|line| if line.starts_with("cr3 = ") { l2 } else { line });
    let in_guest_mode = own.collect::<Vec<_>>().join("\n");
    std::fs::write(folder.path().join("image.toml"), &in_guest_mode).unwrap();
    attach(&bed, "copy", folder.path()).await;
    assert_eq!(said(&bed, "copy").await, nested);
    let mode = state(&bed, "copy").await.nested.unwrap();
    assert_eq!(mode.kind(), v1::NestedModeKind::Observed);
    assert!(mode.reason.contains("when it was recorded"), "{}", mode.reason);

    // No request entered it, and none leaves it.
    let off = v1::set_nested_mode_request::Mode::Off(true);
    let request = v1::SetNestedModeRequest { vcpu: of("copy"), mode: Some(off), ..Default::default() };
    assert_eq!(refusal(bed.walker().set_nested_mode(request).await).0, Code::FailedPrecondition);

    // Saved again, it is the same.
    let again = tempfile::tempdir().unwrap();
    let description = save(&bed, "copy", again.path()).await;
    assert!(description.contains("[vcpu.nested.npt]") && !description.contains("[vcpu.nested.l2]"));
    attach(&bed, "again", again.path()).await;
    assert_eq!(said(&bed, "again").await, nested);
    let hole = v1::TranslateRequest { vcpu: of("again"), ..read(bed.landmark("l2-npt-hole")) };
    assert_eq!(fault(&bed.translate(hole).await.unwrap()).kind(), v1::FaultKind::NestedPageFault);
    bed.stop().await;
}

/// Whether its words are mapped, or fetched because the file has them at odd places.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_truncated_under_its_readers_is_lost() {
    let bed = Bed::plain().await;
    let saved = tempfile::tempdir().unwrap();
    let description = save(&bed, "demo", saved.path()).await;
    let memory = std::fs::read(saved.path().join("memory.bin")).unwrap();
    for (id, shift) in [("mapped", 0), ("fetched", 4)] {
        let folder = tempfile::tempdir().unwrap();
        let mut description = Description::parse(&description).unwrap();
        for region in &mut description.regions {
            region.offset.0 += shift as u64;
        }
        std::fs::write(folder.path().join("image.toml"), description.to_toml().unwrap()).unwrap();
        let file = File::create(folder.path().join("memory.bin")).unwrap();
        file.write_all_at(&memory, shift as u64).unwrap();
        attach(&bed, id, folder.path()).await;
        let asked = || v1::TranslateRequest { vcpu: of(id), ..read(bed.landmark("kernel-data")) };
        page(&bed.translate(asked()).await.unwrap());
        file.set_len(0x1000).unwrap();
        let lost = bed.translate(asked()).await.unwrap_err();
        assert_eq!(lost.code(), Code::Unavailable, "{lost}");
        assert!(lost.message().contains("truncated"), "{lost}");
        let other = v1::TranslateRequest { vcpu: of("demo"), ..asked() };
        page(&bed.translate(other).await.unwrap());
    }
    bed.stop().await;
}

/// Whoever saves a large and empty guest hears that somebody is at work.
#[tokio::test]
async fn a_long_stretch_of_zeroes_is_told() {
    const SIZE: u64 = 100 << 20;
    let bed = Bed::plain().await;
    let folder = tempfile::tempdir().unwrap();
    let memory = File::create(folder.path().join("memory")).unwrap();
    memory.set_len(SIZE).unwrap();
    memory.write_all_at(b"end", SIZE - 3).unwrap();
    let text = format!(
        "version = 1\n[cpu]\nvendor = \"intel\"\nmaxphyaddr = 46\n[[vcpu]]\ncr0 = 0\ncr3 = 0\ncr4 = 0\nefer = 0\n\
         [[region]]\ngpa = 0\nsize = {SIZE:#x}\nfile = \"memory\"\n"
    );
    std::fs::write(folder.path().join("image.toml"), text).unwrap();
    attach(&bed, "empty", folder.path()).await;
    let request = v1::SaveImageRequest { machine: "empty".to_owned(), memory_file: String::new() };
    let mut parts = bed.machines().save_image(request).await.unwrap().into_inner();
    let mut pieces = Vec::new();
    while let Some(part) = parts.message().await.unwrap() {
        if let Some(Part::Piece(piece)) = part.part {
            pieces.push((piece.offset, piece.contents.len()));
        }
    }
    assert_eq!(pieces, [(64 << 20, 0), (SIZE - 4096, 4096)]);
    bed.stop().await;
}
