//! `VcpuService` and `MachineService` where nothing executes.

use pagewalk_proto::v1;
use tonic::Code;

use crate::bed::{Bed, config, from_plain, refusal};

#[tokio::test]
async fn registers_are_read_back_as_written() {
    let bed = Bed::plain().await;
    let before = bed.vcpu().get_registers(v1::GetRegistersRequest::default()).await.unwrap().into_inner();
    from_plain(before.provenance.as_ref());
    let before = before.registers.unwrap();
    assert_eq!((before.cr0, before.cr3, before.cr4), (Some(0x8001_0033), Some(0x2_0000), Some(0x6a0)));
    assert_eq!((before.efer, before.cpl, before.cs, before.pkru), (Some(0xd00), Some(0), Some(8), None));

    let wanted =
        v1::Registers { rax: Some(u64::MAX), rflags: Some(0), cr3: Some(0x2_1000), ..Default::default() };
    let request = v1::SetRegistersRequest { registers: Some(wanted), ..Default::default() };
    let set = bed.vcpu().set_registers(request).await.unwrap().into_inner();
    from_plain(set.provenance.as_ref());
    // Bit 1 of RFLAGS is always set.
    let expected = v1::Registers { rax: Some(u64::MAX), rflags: Some(2), cr3: Some(0x2_1000), ..before };
    assert_eq!(set.registers, Some(expected));
    let sync = v1::GetRegistersRequest { freshness: v1::Freshness::Sync.into(), ..Default::default() };
    let after = bed.vcpu().get_registers(sync).await.unwrap().into_inner();
    assert_eq!(after.registers, Some(expected));
    bed.stop().await;
}

#[tokio::test]
async fn refused_writes_write_nothing() {
    let bed = Bed::plain().await;
    let all = async || {
        let got = bed.vcpu().get_registers(v1::GetRegistersRequest::default()).await.unwrap();
        got.into_inner().registers
    };
    let before = all().await;
    let registers = |r: v1::Registers| v1::Registers { rax: Some(7), ..r };
    for (wanted, reason) in [
        (None, "INVALID_FIELD"),
        (Some(v1::Registers::default()), "INVALID_REGISTERS"),
        (Some(registers(v1::Registers { cr0: Some(1 << 31), ..Default::default() })), "INVALID_REGISTERS"),
        (Some(registers(v1::Registers { cr4: Some(1 << 63), ..Default::default() })), "INVALID_REGISTERS"),
        (Some(registers(v1::Registers { cr3: Some(u64::MAX), ..Default::default() })), "INVALID_REGISTERS"),
        (Some(registers(v1::Registers { pkru: Some(1), ..Default::default() })), "INVALID_REGISTERS"),
        (Some(registers(v1::Registers { cr8: Some(99), ..Default::default() })), "INVALID_REGISTERS"),
        (Some(registers(v1::Registers { rip: Some(1 << 63), ..Default::default() })), "INVALID_REGISTERS"),
        (Some(registers(v1::Registers { rflags: Some(1 << 63), ..Default::default() })), "INVALID_REGISTERS"),
        (
            Some(registers(v1::Registers { gs_base: Some(1 << 63), ..Default::default() })),
            "INVALID_REGISTERS",
        ),
        (Some(registers(v1::Registers { cpl: Some(3), ..Default::default() })), "INVALID_FIELD"),
        (Some(registers(v1::Registers { gs: Some(0), ..Default::default() })), "INVALID_FIELD"),
    ] {
        let request = v1::SetRegistersRequest { registers: wanted, ..Default::default() };
        let answer = refusal(bed.vcpu().set_registers(request).await);
        assert_eq!(answer, (Code::InvalidArgument, reason.to_owned()), "{wanted:?}");
        assert_eq!(all().await, before, "{wanted:?}");
    }
    bed.stop().await;
}

#[tokio::test]
async fn nothing_executes_in_plain_memory() {
    let bed = Bed::plain().await;
    let cannot = (Code::FailedPrecondition, "SOURCE_CANNOT".to_owned());
    assert_eq!(refusal(bed.vcpu().pause_vcpu(v1::PauseVcpuRequest::default()).await), cannot);
    assert_eq!(refusal(bed.vcpu().resume_vcpu(v1::ResumeVcpuRequest::default()).await), cannot);
    assert_eq!(refusal(bed.vcpu().step_vcpu(v1::StepVcpuRequest::default()).await), cannot);

    let answer = bed.vcpu().list_vcpus(v1::ListVcpusRequest::default()).await.unwrap().into_inner();
    let [vcpu] = answer.vcpus.as_slice() else { panic!("{answer:?}") };
    assert_eq!(
        (vcpu.index, vcpu.run_state(), vcpu.mode()),
        (0, v1::RunState::Static, v1::PagingMode::FourLevel)
    );
    assert_eq!((vcpu.cr3, vcpu.rip, vcpu.generation), (0x2_0000, 0xffff_8000_0001_0000, 1));
    assert!(vcpu.run_state_reason.contains("plain memory"), "{vcpu:?}");
    let provenance = answer.provenance.unwrap();
    assert_eq!((provenance.machine.as_str(), provenance.source.as_str()), ("demo", "demo"));
    bed.stop().await;
}

#[tokio::test]
async fn machines_by_id() {
    let bed = Bed::with(config(), &["b=demo:plain", "a=demo:plain"]).await;
    let answer = bed.machines().list_machines(v1::ListMachinesRequest {}).await.unwrap().into_inner();
    assert_eq!(answer.daemon_version, env!("CARGO_PKG_VERSION"));
    assert!(!answer.provenance.unwrap().host.is_empty());
    let ids: Vec<_> = answer.machines.iter().map(|machine| machine.id.as_str()).collect();
    assert_eq!(ids, ["a", "b"]);

    let request = v1::GetMachineRequest { machine: "b".into() };
    let one = bed.machines().get_machine(request).await.unwrap().into_inner();
    assert_eq!(one.provenance.unwrap().machine, "b");
    let one = one.machine.unwrap();
    assert_eq!(one, answer.machines[1]);
    assert_eq!(one.memory_bytes, one.regions.iter().map(|region| region.size).sum::<u64>());
    assert_eq!((one.memory_bytes, one.vcpus, one.maxphyaddr), ((8 << 20) + 0x4000, 1, 48));
    assert!(one.regions[1].read_only && !one.regions[0].read_only);
    let can = one.capabilities.unwrap();
    assert!(can.can_set_registers && !can.live && !can.can_pause && !can.can_step && !can.real_nested);
    assert!(one.landmarks.iter().all(|l| !l.name.is_empty() && l.description.ends_with('.')));

    // Two machines: nobody knows which one is meant.
    let unnamed = (Code::InvalidArgument, "MACHINE_NOT_NAMED".to_owned());
    assert_eq!(refusal(bed.machines().get_machine(v1::GetMachineRequest::default()).await), unnamed);
    assert_eq!(refusal(bed.vcpu().list_vcpus(v1::ListVcpusRequest::default()).await), unnamed);
    assert_eq!(refusal(bed.translate(crate::bed::read(0)).await), unnamed);
    bed.stop().await;
}
