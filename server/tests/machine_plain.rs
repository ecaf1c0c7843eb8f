//! The demo machine without `/dev/kvm`: the same memory and registers, and nothing that executes.
#![allow(clippy::unwrap_used)]
#[allow(dead_code)]
mod demo_landmarks;

use std::sync::Arc;
use std::time::{Duration, Instant};

use pagewalk::{NptControls, PagingMode, StateError};
use pagewalkd::machine::{AttachError, LookupError, Machine, MachineSpec, Machines};
use pagewalkd::vcpu::{
    EnterL2, L2Error, NestedMode, NestedRequest, RegisterChanges, RunState, SecondDimension, Vcpu, VcpuError,
};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn open(spec: &str) -> (Machine, Arc<Vcpu>) {
    let machine = spec.parse::<MachineSpec>().unwrap().open().unwrap();
    let vcpu = Arc::clone(machine.vcpu(0).unwrap());
    (machine, vcpu)
}

const OFF: NestedRequest = NestedRequest::Off { walker_only: false };

/// Nested mode with the demo's L2, where the walkers alone are switched.
fn overlaid() -> NestedMode {
    let EnterL2 { second, l2, .. } = demo_landmarks::overlay();
    NestedMode::WalkerOnly { second, l2 }
}

#[tokio::test]
async fn every_landmark_means_what_it_promises() {
    let (machine, vcpu) = open("demo:plain");
    assert!(machine.source().cpu().gib_pages, "so that the 1 GiB leaf is checked here");
    let own = vcpu.sync(soon()).await.unwrap();
    let nested = vcpu.set_nested(NestedRequest::Enter(demo_landmarks::overlay()), soon()).await.unwrap().0;
    demo_landmarks::check(&machine, &own, &nested);
}

#[tokio::test]
async fn nothing_executes_and_it_says_why() {
    let (machine, vcpu) = open("demo:plain");
    assert!(machine.source().description().contains("demo:plain was asked for"));
    assert!(!machine.source().capabilities().live);
    assert_eq!(vcpu.latest().run_state, RunState::Static);
    for refused in [vcpu.pause(soon()).await, vcpu.resume(soon()).await, vcpu.step(soon()).await] {
        let error = refused.unwrap_err();
        assert!(matches!(&error, VcpuError::Unsupported(why) if why.contains("plain memory")), "{error}");
    }
}

#[test]
fn the_demo_runs_where_it_can_and_says_where_it_cannot() {
    let kvm = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let (machine, vcpu) = open("demo");
    let (description, state) = (machine.source().description(), vcpu.latest().run_state);
    match kvm {
        Ok(_) => {
            assert_eq!(description, "demo guest, running on /dev/kvm");
            assert_ne!(state, RunState::Static);
        }
        Err(e) => {
            assert!(
                description.contains("plain memory") && description.contains(&e.to_string()),
                "{description}"
            );
            assert_eq!(state, RunState::Static);
        }
    }
}

#[tokio::test]
async fn registers_are_written_whole_or_not_at_all() {
    let (_machine, vcpu) = open("demo:plain");
    let before = vcpu.latest();
    let changes = RegisterChanges { cr3: Some(0x2_1000), rax: Some(7), ..RegisterChanges::default() };
    let after = vcpu.set_registers(changes, soon()).await.unwrap();
    assert_eq!((after.registers.cr3, after.registers.rax), (0x2_1000, 7));
    assert_eq!(after.generation, before.generation + 1);

    let same_walk = RegisterChanges { rax: Some(8), ..RegisterChanges::default() };
    assert_eq!(vcpu.set_registers(same_walk, soon()).await.unwrap().generation, after.generation);

    let invalid = RegisterChanges { rax: Some(9), cr0: Some(1 << 40), ..RegisterChanges::default() };
    let error = vcpu.set_registers(invalid, soon()).await.unwrap_err();
    assert!(matches!(&error, VcpuError::InvalidRegisters(why) if why.contains("CR0")), "{error}");
    assert_eq!(vcpu.latest().registers.rax, 8);
    assert_eq!(
        vcpu.set_registers(RegisterChanges::default(), soon()).await.unwrap_err(),
        VcpuError::NothingToWrite
    );
}

#[tokio::test]
async fn nested_mode_comes_and_goes_in_one_publication() {
    let (_machine, vcpu) = open("demo:plain");
    let mut generations = vcpu.subscribe();
    let own = vcpu.latest();
    let nested = vcpu.set_nested(NestedRequest::Enter(demo_landmarks::overlay()), soon()).await.unwrap().0;
    assert_eq!(nested.generation, own.generation + 1);
    assert_eq!(nested.nested, overlaid());
    assert_eq!(nested.registers, own.registers, "the vCPU's own registers stay what they are");
    assert!(nested.walker.as_ref().unwrap().ngpa_walk().is_some());
    assert_eq!(*generations.borrow_and_update(), nested.generation);

    let mut bad = demo_landmarks::overlay();
    bad.second = SecondDimension::Npt {
        ncr3: 1 << 60,
        host: own.registers.control(),
        controls: NptControls::default(),
    };
    let bad = NestedRequest::Enter(bad);
    let error = vcpu.set_nested(bad, soon()).await.unwrap_err();
    assert!(
        matches!(
            error,
            VcpuError::InvalidNested(L2Error::Npt(StateError::ReservedBits { register: "nCR3", .. }))
        ),
        "{error:?}"
    );
    let kept = vcpu.sync(soon()).await.unwrap();
    assert_eq!((kept.nested, kept.generation), (nested.nested, nested.generation));

    // L2's registers that were given stay; the others follow the vCPU's.
    let moved = RegisterChanges { cr3: Some(0x2_1000), ..RegisterChanges::default() };
    let moved = vcpu.set_registers(moved, soon()).await.unwrap();
    assert_eq!(moved.walker, nested.walker, "L2's CR3 is its own");
    let nowp = RegisterChanges { cr0: Some(own.registers.cr0 & !(1 << 16)), ..RegisterChanges::default() };
    assert_ne!(vcpu.set_registers(nowp, soon()).await.unwrap().walker, nested.walker, "CR0 is the vCPU's");

    let off = vcpu.set_nested(OFF, soon()).await.unwrap().0;
    assert!(off.walker.as_ref().unwrap().ngpa_walk().is_none());
    let again = vcpu.set_nested(OFF, soon()).await.unwrap().0;
    assert_eq!(again.generation, off.generation, "nothing changed");
}

#[tokio::test]
async fn nested_mode_lies_over_any_paging_mode() {
    let (_machine, vcpu) = open("demo:plain");
    vcpu.set_nested(NestedRequest::Enter(demo_landmarks::overlay()), soon()).await.unwrap();
    // PAE paging outside long mode.
    let pae = RegisterChanges { efer: Some(0), ..RegisterChanges::default() };
    let under_npt = vcpu.set_registers(pae, soon()).await.unwrap();
    let walker = under_npt.walker.as_ref().unwrap();
    assert_eq!(walker.gva_walk().format().mode(), PagingMode::Pae);
    assert!(walker.ngpa_walk().is_some());
    assert!(under_npt.assumed.iter().any(|assumed| assumed.starts_with("PDPTE")), "{:?}", under_npt.assumed);
    let off = vcpu.set_nested(OFF, soon()).await.unwrap().0;
    assert_eq!(off.nested, NestedMode::Off);
    assert!(off.walker.as_ref().unwrap().ngpa_walk().is_none());
    // What the walker does not model is said.
    let with = async |bits| {
        let cr4 = Some(off.registers.cr4 | bits);
        let changes = RegisterChanges { cr4, efer: Some(0xd00), ..Default::default() };
        let mut assumed = vcpu.set_registers(changes, soon()).await.unwrap().assumed.clone();
        assumed.retain(|assumed| !assumed.starts_with("PDPTE"));
        assumed
    };
    assert_eq!(with(1 << 27).await, ["CR4.LASS=0"]);
    // And so is a register that this vCPU does not have.
    assert_eq!(with(1 << 22 | 1 << 24).await, ["PKRU=0x0", "PKRS=0x0"]);
    assert_eq!(with(0).await, [""; 0]);
}

#[test]
fn machines_are_found_by_id() {
    let (a, _) = open("a=demo:plain");
    let (b, _) = open("b=demo:plain");
    let one = Machines::new([a.clone()]).unwrap();
    assert_eq!(one.get("").unwrap().id(), "a");
    let two = Machines::new([b, a.clone()]).unwrap();
    let ids = vec!["a".to_owned(), "b".to_owned()];
    assert_eq!(two.get("").unwrap_err(), LookupError::Unnamed { ids: ids.clone() });
    assert_eq!(two.get("c").unwrap_err(), LookupError::NoMachine { id: "c".into(), ids });
    assert_eq!(two.get("b").unwrap().id(), "b");
    assert_eq!(Machines::default().get("").unwrap_err(), LookupError::Unnamed { ids: vec![] });
    assert!(matches!(
        Machines::new([a.clone(), a.clone()]),
        Err(AttachError::DuplicateId { id }) if id == "a"
    ));
    assert_eq!(a.vcpu(1).unwrap_err(), LookupError::NoVcpu { machine: "a".into(), index: 1, count: 1 });
}
