//! Machines that come and go at run time, and machines that are lost.

use std::sync::Arc;

use pagewalk_proto::v1;
use pagewalkd::machine::{Capabilities, Health, LocalSource, Machine};
use tonic::Code;

use crate::bed::{Bed, SOON, config, fault, open, page, read, refusal};
use crate::stuck::{Gate, OpenAtEnd, machine as stuck_machine};

fn attach(spec: &str) -> v1::AttachMachineRequest {
    v1::AttachMachineRequest { spec: spec.to_owned() }
}

fn detach(machine: &str, end_guest: bool) -> v1::DetachMachineRequest {
    v1::DetachMachineRequest { machine: machine.to_owned(), end_guest }
}

fn of(machine: &str, request: v1::TranslateRequest) -> v1::TranslateRequest {
    v1::TranslateRequest { vcpu: Some(v1::VcpuRef { machine: machine.to_owned(), vcpu: 0 }), ..request }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_is_attached_asked_and_detached() {
    let bed = Bed::plain().await;
    let mut machines = bed.machines();
    let answer = machines.attach_machine(attach("b=demo:plain")).await.unwrap().into_inner();
    let machine = answer.machine.unwrap();
    assert_eq!((machine.id.as_str(), machine.state()), ("b", v1::MachineState::Alive));
    assert_eq!(answer.provenance.unwrap().machine, "b");
    let can = machine.capabilities.unwrap();
    assert!(can.can_write_memory && can.ends_when_detached);

    let gva = bed.landmark("kernel-text");
    assert_eq!(page(&bed.translate(of("b", read(gva))).await.unwrap()).gpa, 0x1_0000);
    // Now that there are two, they have to be named.
    let unnamed = bed.translate(read(gva)).await;
    assert!(unnamed.as_ref().unwrap_err().message().contains("in `machine`"), "{unnamed:?}");
    assert_eq!(refusal(unnamed), (Code::InvalidArgument, "MACHINE_NOT_NAMED".to_owned()));
    let refused = machines.detach_machine(detach("b", false)).await;
    assert_eq!(refusal(refused), (Code::FailedPrecondition, "GUEST_WOULD_END".to_owned()));
    machines.detach_machine(detach("b", true)).await.unwrap();
    assert_eq!(
        refusal(bed.translate(of("b", read(gva))).await),
        (Code::NotFound, "MACHINE_NOT_FOUND".to_owned())
    );
    assert_eq!(page(&bed.translate(read(gva)).await.unwrap()).gpa, 0x1_0000);
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn attaching_what_cannot_be_is_refused_with_what_to_do() {
    let bed = Bed::plain().await;
    let mut machines = bed.machines();
    for (spec, code, reason, said) in [
        ("", Code::InvalidArgument, "INVALID_FIELD", "no source"),
        ("=demo", Code::InvalidArgument, "INVALID_FIELD", "id"),
        ("x=nothing:y", Code::InvalidArgument, "INVALID_FIELD", "nothing"),
        (&"x".repeat(9000), Code::InvalidArgument, "INVALID_FIELD", "8192"),
        ("demo:plain", Code::AlreadyExists, "MACHINE_EXISTS", "already"),
        (
            "x=qemu:qmp=/nonexistent/vm.qmp",
            Code::FailedPrecondition,
            "CANNOT_ATTACH",
            "start QEMU with -qmp unix:PATH",
        ),
        ("x=kvm:elf=/nonexistent/kernel", Code::FailedPrecondition, "CANNOT_ATTACH", "/nonexistent/kernel"),
    ] {
        let status = machines.attach_machine(attach(spec)).await.unwrap_err();
        assert!(status.message().contains(said), "{spec}: {status:?}");
        assert_eq!(refusal(Err::<(), _>(status)), (code, reason.to_owned()), "{spec}");
    }
    for (id, code, reason) in
        [("", Code::InvalidArgument, "INVALID_FIELD"), ("nobody", Code::NotFound, "MACHINE_NOT_FOUND")]
    {
        let refused = machines.detach_machine(detach(id, true)).await;
        assert_eq!(refusal(refused), (code, reason.to_owned()), "{id:?}");
    }
    bed.unharmed().await;
    bed.stop().await;
}

/// As many as are attached at once wait for QEMUs that say nothing.
#[tokio::test(flavor = "multi_thread")]
async fn attaches_wait_for_a_place_and_one_whose_client_leaves_takes_none() {
    const PLACES: usize = 4;
    let bed = Bed::plain().await;
    let folder = tempfile::tempdir().unwrap();
    let mut silent = Vec::new();
    for at in 0..PLACES {
        let socket = folder.path().join(at.to_string());
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let (mut client, spec) = (bed.machines(), format!("q{at}=qemu:qmp={}", socket.display()));
        let asked = tokio::spawn(async move { client.attach_machine(attach(&spec)).await });
        let (connection, _) = tokio::time::timeout(SOON, listener.accept()).await.unwrap().unwrap();
        silent.push((asked, connection));
    }
    let mut late = tonic::Request::new(attach("late=demo:plain"));
    late.set_timeout(std::time::Duration::from_millis(100));
    let late = bed.machines().attach_machine(late).await.unwrap_err();
    assert!(matches!(late.code(), Code::DeadlineExceeded | Code::Cancelled), "{late:?}");
    let start = |spec: &'static str| {
        let mut client = bed.machines();
        tokio::spawn(async move { client.attach_machine(attach(spec)).await })
    };
    let (left, waits) = (start("left=demo:plain"), start("waits=demo:plain"));
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    left.abort();
    assert!(!waits.is_finished());
    for (asked, connection) in silent {
        let refused = tokio::time::timeout(SOON, asked).await.unwrap().unwrap();
        assert_eq!(refusal(refused), (Code::FailedPrecondition, "CANNOT_ATTACH".to_owned()));
        drop(connection);
    }
    tokio::time::timeout(SOON, waits).await.unwrap().unwrap().unwrap();
    for spec in ["left=demo:plain", "late=demo:plain"] {
        bed.machines().attach_machine(attach(spec)).await.unwrap();
    }
    bed.stop().await;
}

/// At its socket as many clients wait as may: one more would wait without end, and keep its place.
#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_takes_nobody_keeps_no_place() {
    let bed = Bed::plain().await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm.qmp");
    let socket = tokio::net::UnixSocket::new_stream().unwrap();
    socket.bind(&path).unwrap();
    let _listener = socket.listen(0).unwrap();
    let mut waiting = Vec::new();
    while let Ok(client) = tokio::net::UnixStream::connect(&path).await {
        waiting.push(client);
    }
    let spec = format!("q=qemu:qmp={}", path.display());
    let mut client = bed.machines();
    let asked = client.attach_machine(attach(&spec));
    let status = tokio::time::timeout(SOON, asked).await.unwrap().unwrap_err();
    assert!(status.message().contains("one more -qmp"), "{status:?}");
    assert_eq!(refusal(Err::<(), _>(status)), (Code::FailedPrecondition, "CANNOT_ATTACH".to_owned()));
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_machine_one_is_to_be_attached() {
    let bed = Bed::plain().await;
    let gva = bed.landmark("kernel-text");
    bed.machines().detach_machine(detach("demo", true)).await.unwrap();
    let status = bed.translate(read(gva)).await.unwrap_err();
    assert!(status.message().contains("attach one"), "{status:?}");
    assert_eq!(refusal(Err::<(), _>(status)), (Code::InvalidArgument, "MACHINE_NOT_NAMED".to_owned()));
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_end_when_their_machine_goes() {
    let bed = Bed::with(config(), &["a=demo:plain", "b=demo:plain"]).await;
    let watch = |machine: &str| v1::WatchWalkerStateRequest {
        vcpu: Some(v1::VcpuRef { machine: machine.to_owned(), vcpu: 0 }),
        ..Default::default()
    };
    let mut detached = bed.walker().watch_walker_state(watch("b")).await.unwrap().into_inner();
    let mut lost = bed.walker().watch_walker_state(watch("a")).await.unwrap().into_inner();
    assert!(detached.message().await.unwrap().is_some() && lost.message().await.unwrap().is_some());
    bed.machines().detach_machine(detach("b", true)).await.unwrap();
    let end = tokio::time::timeout(SOON, detached.message()).await.unwrap();
    assert_eq!(refusal(end), (Code::Unavailable, "MACHINE_DETACHED".to_owned()));

    bed.machine.source().health().declare_lost("its process has ended");
    let end = tokio::time::timeout(SOON, lost.message()).await.unwrap();
    assert_eq!(refusal(end), (Code::Unavailable, "MACHINE_LOST".to_owned()));
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_machine_says_so_and_the_others_go_on() {
    let bed = Bed::with(config(), &["a=demo:plain", "b=demo:plain"]).await;
    bed.machine.source().health().declare_lost("its process has ended");
    let gva = bed.landmark("kernel-text");
    let status = bed.translate(of("a", read(gva))).await.unwrap_err();
    assert!(status.message().contains("its process has ended"), "{status:?}");
    assert_eq!(refusal(Err::<(), _>(status)), (Code::Unavailable, "MACHINE_LOST".to_owned()));
    assert_eq!(page(&bed.translate(of("b", read(gva))).await.unwrap()).gpa, 0x1_0000);
    let listed = bed.machines().list_machines(v1::ListMachinesRequest {}).await.unwrap().into_inner();
    let states: Vec<_> = listed.machines.iter().map(|m| (m.state(), m.state_reason.as_str())).collect();
    assert_eq!(states, [(v1::MachineState::Lost, "its process has ended"), (v1::MachineState::Alive, "")]);
    bed.machines().detach_machine(detach("a", true)).await.unwrap();
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_under_way_when_the_machine_was_lost_is_no_answer() {
    let gate = Gate::default();
    let _end = OpenAtEnd(gate.clone());
    let bed = Bed::of(config(), vec![open("demo:plain"), stuck_machine("stuck", &gate)]).await;
    let gva = bed.landmark("kernel-text");
    let request = v1::TranslateRequest { freshness: v1::Freshness::Sync.into(), ..of("stuck", read(gva)) };
    let mut client = bed.translation();
    let asked = tokio::spawn(async move { client.translate(request).await.map(drop) });
    // The call waits for the vCPU; then the machine is lost, and only then does the vCPU answer.
    let vcpu = bed.last.vcpu(0).unwrap();
    while Arc::strong_count(vcpu) == 1 {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    bed.last.source().health().declare_lost("its process has ended");
    gate.open();
    let answer = tokio::time::timeout(SOON, asked).await.unwrap().unwrap();
    assert_eq!(refusal(answer), (Code::Unavailable, "MACHINE_LOST".to_owned()));
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_is_only_read_refuses_accessed_and_dirty_bits() {
    let demo = open("demo:plain");
    let source = demo.source();
    let only_read = LocalSource {
        kind: "only-read",
        description: "the demo machine, not to be written".into(),
        vcpus: source.vcpus().to_vec(),
        memory: source.memory(),
        capabilities: Capabilities { can_write_memory: false, ..source.capabilities().clone() },
        cpu: source.cpu(),
        landmarks: source.landmarks().to_vec(),
        health: Health::default(),
    };
    let bed = Bed::of(config(), vec![Machine::new("demo", Arc::new(only_read))]).await;
    let gva = bed.landmark("kernel-text");
    let set = v1::TranslateRequest { ad_policy: v1::AdPolicy::Set.into(), ..read(gva) };
    assert_eq!(refusal(bed.translate(set).await), (Code::FailedPrecondition, "PRECONDITION".to_owned()));
    assert_eq!(page(&bed.translate(read(gva)).await.unwrap()).gpa, 0x1_0000);
    assert_eq!(fault(&bed.translate(read(bed.landmark("not-present"))).await.unwrap()).level, 1);
    bed.stop().await;
}

/// Images with as much in them as there may be.
#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_large_machines_says_what_it_leaves_out() {
    let bed = Bed::plain().await;
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("memory"), [0; 4096]).unwrap();
    let mut text = "version = 1\n[cpu]\nvendor = \"intel\"\nmaxphyaddr = 46\n[[vcpu]]\ncr0 = 0\ncr3 = 0\ncr4 = 0\nefer = 0\n\
                    [[region]]\ngpa = 0\nsize = 0x1000\nfile = \"memory\"\n"
        .to_owned();
    for number in 0..4096 {
        let description = "x".repeat(256);
        text += &format!(
            "[[landmark]]\nname = \"{number:064}\"\naddress = 0x1000\ndescription = \"{description}\"\n"
        );
    }
    let mut machines = bed.machines();
    let whole = async |id: &str| {
        let request = v1::GetMachineRequest { machine: id.to_owned() };
        bed.machines().get_machine(request).await.unwrap().into_inner().machine.unwrap()
    };
    for id in ["a", "b", "z"] {
        let file = folder.path().join(id);
        std::fs::write(&file, &text).unwrap();
        let answer = machines.attach_machine(attach(&format!("{id}=image:{}", file.display()))).await;
        let attached = answer.unwrap().into_inner().machine.unwrap();
        assert_eq!((attached.landmarks.len(), attached.abridged), (4096, false));
        assert_eq!(whole(id).await, attached);
    }
    let listed = machines.list_machines(v1::ListMachinesRequest {}).await.unwrap().into_inner().machines;
    let said: Vec<_> = listed.iter().map(|m| (m.id.as_str(), m.abridged, m.landmarks.is_empty())).collect();
    assert_eq!(said, [("a", true, true), ("b", false, false), ("demo", false, false), ("z", false, false)]);
    assert!(listed[0].description.starts_with("image ") && listed[0].memory_bytes == 4096);
    bed.stop().await;
}

/// No source of the daemon's says so much, but one of a VMM's own may.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_too_large_says_so() {
    let demo = open("demo:plain");
    let source = demo.source();
    let large = LocalSource {
        kind: "own",
        description: "x".repeat(5 << 20),
        vcpus: source.vcpus().to_vec(),
        memory: source.memory(),
        capabilities: source.capabilities().clone(),
        cpu: source.cpu(),
        landmarks: source.landmarks().to_vec(),
        health: Health::default(),
    };
    let bed = Bed::of(config(), vec![Machine::new("a", Arc::new(large)), demo]).await;
    let request = v1::GetMachineRequest { machine: "a".to_owned() };
    let refused = bed.machines().get_machine(request).await;
    assert!(refused.as_ref().unwrap_err().message().contains("the answer is too large"), "{refused:?}");
    assert_eq!(refusal(refused), (Code::ResourceExhausted, "ANSWER_TOO_LARGE".to_owned()));
    let listed = bed.machines().list_machines(v1::ListMachinesRequest {}).await.unwrap().into_inner();
    assert_eq!(listed.machines.iter().map(|m| m.abridged).collect::<Vec<_>>(), [true, false]);
    bed.stop().await;
}
