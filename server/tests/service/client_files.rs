//! Files that the daemon is asked to make: where they land, and that nothing is made anywhere else.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use pagewalk_proto::v1;
use pagewalk_proto::v1::machine_service_client::MachineServiceClient;
use pagewalkd::config::Config;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::bed::{Bed, config, refusal};
use crate::bzimage::bzimage;

/// A folder with a kernel that halts.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("kernel"), bzimage(&[0xf4])).unwrap();
    folder
}

/// Attaches a machine with that option, and lets it go again. Without `/dev/kvm` its files are made before it is refused.
async fn attach(
    client: &mut MachineServiceClient<Channel>,
    folder: &Path,
    option: &str,
) -> Result<(), Status> {
    let spec = format!("vm=kvm:kernel={}/kernel,mem=18M,{option}", folder.display());
    let answer = client.attach_machine(v1::AttachMachineRequest { spec }).await;
    if answer.is_ok() {
        let request = v1::DetachMachineRequest { machine: "vm".into(), end_guest: true };
        client.detach_machine(request).await.unwrap();
    }
    match answer {
        Err(status) if !status.message().contains("/dev/kvm") => Err(status),
        _ => Ok(()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn none_are_made_for_clients_unless_the_operator_gives_a_folder() {
    let bed = Bed::plain().await;
    let folder = folder();
    let wanted = folder.path().join("wanted");
    for key in ["log", "console"] {
        let option = format!("{key}={}", wanted.display());
        let status = attach(&mut bed.machines(), folder.path(), &option).await.unwrap_err();
        assert!(status.message().contains("--client-files"), "{status:?}");
        assert_eq!(refusal(Err::<(), _>(status)), (Code::PermissionDenied, "FILE_NOT_ALLOWED".to_owned()));
    }
    assert!(!wanted.exists());
    attach(&mut bed.machines(), folder.path(), "cpus=1").await.unwrap();
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_that_folder_they_are_made_by_name_and_nothing_leads_out_of_it() {
    let (folder, outside) = (folder(), tempfile::tempdir().unwrap());
    let precious = outside.path().join("precious");
    fs::write(&precious, "precious").unwrap();
    symlink(&precious, folder.path().join("link")).unwrap();
    symlink(outside.path().join("new"), folder.path().join("dangling")).unwrap();
    symlink(outside.path(), folder.path().join("out")).unwrap();
    let bed =
        Bed::with(Config { client_files: Some(folder.path().to_owned()), ..config() }, &["demo:plain"]).await;
    for key in ["log", "console"] {
        for path in ["../new", "out/new", "./new", "..", &outside.path().join("new").display().to_string()] {
            let refused = attach(&mut bed.machines(), folder.path(), &format!("{key}={path}")).await;
            assert_eq!(refusal(refused), (Code::InvalidArgument, "INVALID_FIELD".to_owned()), "{key}={path}");
        }
        for link in ["link", "dangling", "out"] {
            let refused = attach(&mut bed.machines(), folder.path(), &format!("{key}={link}")).await;
            let expected = (Code::FailedPrecondition, "CANNOT_ATTACH".to_owned());
            assert_eq!(refusal(refused), expected, "{key}={link}");
        }
    }
    assert_eq!(fs::read(&precious).unwrap(), b"precious");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    attach(&mut bed.machines(), folder.path(), "log=guest.log,console=guest.console").await.unwrap();
    assert!(folder.path().join("guest.log").is_file());
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemons_own_user_may_have_them_anywhere() {
    let folder = folder();
    let socket = folder.path().join("socket");
    let bed = Bed::with(Config { uds: Some(socket.clone()), ..config() }, &["demo:plain"]).await;
    let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display())).unwrap();
    let mut client = MachineServiceClient::new(endpoint.connect().await.unwrap());
    let log = folder.path().join("log");
    attach(&mut client, folder.path(), &format!("log={}", log.display())).await.unwrap();
    assert!(log.is_file());
    drop(client);
    bed.stop().await;
}
