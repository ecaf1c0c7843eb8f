//! Addresses by symbols, over the demo machine, whose symbols are taken as they stand: it has no Linux kernel.

use std::io::Write as _;

use pagewalk_proto::v1;
use pagewalk_proto::v1::machine_service_client::MachineServiceClient;
use pagewalk_proto::v1::mapping_service_client::MappingServiceClient;
use pagewalk_proto::v1::memory_service_client::MemoryServiceClient;
use tempfile::NamedTempFile;
use tonic::{Code, Status};

use crate::bed::{Bed, config, page, read, refusal, text as named};

const TEXT: u64 = 0xffff_8000_0001_0000;

fn file(text: &str) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

async fn bed() -> Bed {
    let symbols = file(
        "ffff800000010000 T kernel_text\nffff800000010800 t twice\nffff800000010900 t twice\n0000000000000010 A low\n",
    );
    let spec = format!("demo:plain,symbols={}", symbols.path().display());
    Bed::with(config(), &[&spec]).await
}

#[track_caller]
fn refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code, reason: &str, said: &str) {
    let message = answer.as_ref().map_or_else(|status| status.message().to_owned(), |_| String::new());
    assert_eq!(refusal(answer), (code, reason.to_owned()), "{message}");
    assert!(message.contains(said), "{said:?} is missing in {message:?}");
}

fn translate(text: &str) -> v1::TranslateRequest {
    v1::TranslateRequest { address: named(text), ..read(0) }
}

#[tokio::test]
async fn symbols_stand_for_addresses() {
    let bed = bed().await;
    for (text, address) in [
        ("kernel_text", TEXT),
        (" kernel_text + 0x10", TEXT + 0x10),
        ("kernel_text-1", TEXT - 1),
        ("low+0", 0x10),
        ("0xffff_8000_0001_0000", TEXT),
    ] {
        let answer = bed.translate(translate(text)).await.unwrap();
        assert_eq!(answer.address, address, "{text}");
    }
    let answer = bed
        .translate(v1::TranslateRequest { explain: true, trace: true, ..translate("kernel_text+0x10") })
        .await
        .unwrap();
    assert_eq!(answer.symbol, Some(v1::Symbol { name: "kernel_text".into(), offset: 0x10 }));
    assert_eq!(page(&answer).gpa, 0x1_0010);
    let begin = "GVA 0xffff800000010010 <kernel_text+0x10>, ";
    assert!(answer.explanation.starts_with(begin), "{}", answer.explanation);
    // Its tables are not known to be in any image.
    assert!(answer.steps.iter().all(|step| step.symbol.is_none()));
    // No symbol is near.
    assert_eq!(bed.translate(read(TEXT + (1 << 20) + 0x900)).await.unwrap().symbol, None);

    let request = v1::ReadMemoryRequest {
        at: Some(v1::read_memory_request::At::Gva(named("kernel_text+4").unwrap())),
        length: 4,
        ..Default::default()
    };
    let mut memory = MemoryServiceClient::new(bed.channel.clone());
    let answer = memory.read_memory(request).await.unwrap().into_inner();
    assert_eq!((answer.address, answer.data.len()), (TEXT + 4, 4));

    let range = v1::GvaRange { start: named("kernel_text"), end: named("kernel_text+0x1000") };
    let request = v1::ListMappingsRequest { range: Some(range), ..Default::default() };
    let mut mapping = MappingServiceClient::new(bed.channel.clone());
    let mut parts = mapping.list_mappings(request).await.unwrap().into_inner();
    let part = parts.message().await.unwrap().unwrap();
    assert_eq!(part.extents.iter().map(|extent| extent.start).collect::<Vec<_>>(), [TEXT]);

    let seen = v1::PageFault { error_code: 0, cr2: named("kernel_text") };
    let request = v1::ExplainFaultRequest {
        seen: Some(v1::explain_fault_request::Seen::PageFault(seen)),
        ..Default::default()
    };
    let explained = bed.translation().explain_fault(request).await.unwrap().into_inner();
    assert_eq!(explained.symbol, Some(v1::Symbol { name: "kernel_text".into(), offset: 0 }));
    assert!(explained.explanation.contains("<kernel_text>"), "{}", explained.explanation);
    bed.stop().await;
}

#[tokio::test]
async fn what_means_no_address_is_refused() {
    let bed = bed().await;
    for (text, said) in [
        ("kernel_txt", "close to it are `kernel_text`"),
        ("nothing_like_it", "there is no symbol"),
        ("twice", "2 addresses, 0xffff800000010800, 0xffff800000010900"),
        ("ffff800000010000", "hex needs 0x in front"),
        ("ffff_8000_0001_0000", "hex needs 0x in front"),
        ("kernel_text+", "neither a number"),
        ("kernel-text", "`kernel-text` is neither a number"),
        ("low-0x11", "beyond 64 bits"),
        ("kernel_text+0xffffffffffff", "beyond 64 bits"),
    ] {
        refused(bed.translate(translate(text)).await, Code::InvalidArgument, "INVALID_FIELD", said);
    }
    // A symbol is no physical address.
    let request = v1::ReadMemoryRequest {
        at: Some(v1::read_memory_request::At::Gpa(named("kernel_text").unwrap())),
        length: 4,
        ..Default::default()
    };
    let mut memory = MemoryServiceClient::new(bed.channel.clone());
    refused(memory.read_memory(request).await, Code::InvalidArgument, "INVALID_FIELD", "is no number");
    bed.stop().await;

    let bare = Bed::plain().await;
    refused(
        bare.translate(translate("kernel_text")).await,
        Code::InvalidArgument,
        "INVALID_FIELD",
        "symbols=FILE",
    );
    bare.stop().await;
}

#[tokio::test]
async fn a_machine_tells_its_symbols() {
    let bed = bed().await;
    let mut machines = MachineServiceClient::new(bed.channel.clone());
    let machine =
        machines.get_machine(v1::GetMachineRequest::default()).await.unwrap().into_inner().machine.unwrap();
    let symbols = machine.symbols.unwrap();
    assert_eq!(
        (symbols.count, symbols.placement(), symbols.slide),
        (4, v1::SymbolPlacement::AsWritten, None)
    );
    assert!(symbols.reason.contains("linux_banner"));
    for (text, said) in [
        ("ffffffff81000000 T _text\nnonsense\n", "line 2"),
        ("", "no symbols"),
        ("MZ", "vmlinux"),
        ("\x7fELF", "ELF"),
    ] {
        let symbols = file(text);
        let spec = format!("other=demo:plain,symbols={}", symbols.path().display());
        let answer = machines.attach_machine(v1::AttachMachineRequest { spec }).await;
        refused(answer, Code::FailedPrecondition, "CANNOT_ATTACH", said);
    }
    let spec = "other=demo:plain,symbols=/nonexistent/System.map".to_owned();
    let answer = machines.attach_machine(v1::AttachMachineRequest { spec }).await;
    refused(answer, Code::FailedPrecondition, "CANNOT_ATTACH", "/nonexistent/System.map");
    bed.stop().await;
}
