//! Files that the daemon makes because a client says so: a console's socket and log, in the specification of a machine.
//!
//! Whoever asks over the Unix socket as the daemon's own user could make such a file by itself, and may name any. Others may
//! name files in one folder, if the operator has given one: by a name alone, so that none leads out of it.

use std::path::PathBuf;

use tokio::net::UnixStream;
use tonic::Request;
use tonic::transport::server::UdsConnectInfo;

use crate::layer::Peer;
use crate::machine::MachineSpec;
use crate::status::Error;

#[derive(Debug)]
pub(crate) struct ClientFiles {
    folder: Option<PathBuf>,
    own_user: Option<u32>,
}

impl ClientFiles {
    /// In `folder`, or nowhere. To be called within a runtime.
    pub(crate) fn new(folder: Option<PathBuf>) -> Self {
        // At both ends of such a pair is this process.
        let own = UnixStream::pair().and_then(|(end, _)| end.peer_cred());
        Self { folder, own_user: own.ok().map(|own| own.uid()) }
    }

    /// Has the files that are to be made for `spec` lie where the client behind `request` may have them.
    pub(super) fn confine<T>(&self, spec: &mut MachineSpec, request: &Request<T>) -> Result<(), Error> {
        if self.is_own_user(request) {
            return Ok(());
        }
        for (key, path) in spec.made_files() {
            let folder = self
                .folder
                .as_ref()
                .ok_or_else(|| Error::FileNotAllowed { file: format!("{key}={}", path.display()) })?;
            let name = path.file_name().filter(|name| *name == path.as_os_str());
            *path = folder.join(name.ok_or_else(|| {
                let problem =
                    "the name of a file, without a folder: it is made in the folder of --client-files";
                Error::invalid("spec", format!("{key}={}: write {problem}", path.display()))
            })?);
        }
        Ok(())
    }

    fn is_own_user<T>(&self, request: &Request<T>) -> bool {
        let peer = request.extensions().get::<Peer<UdsConnectInfo>>();
        let user = peer.and_then(|peer| peer.info.peer_cred);
        user.is_some_and(|user| Some(user.uid()) == self.own_user)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn spec(option: &str) -> MachineSpec {
        format!("kvm:kernel=k,{option}").parse().unwrap()
    }

    fn confined(folder: Option<&str>, option: &str) -> Result<PathBuf, String> {
        let files = ClientFiles { folder: folder.map(PathBuf::from), own_user: None };
        let mut spec = spec(option);
        files.confine(&mut spec, &Request::new(())).map_err(|error| error.to_string())?;
        let (_, path) = spec.made_files().next().unwrap();
        Ok(path.clone())
    }

    #[test]
    fn a_name_leads_into_the_folder_and_a_path_nowhere() {
        for key in ["log", "console"] {
            assert_eq!(confined(Some("/f"), &format!("{key}=a..b")).unwrap(), PathBuf::from("/f/a..b"));
            for path in ["/etc/passwd", "/f/a", "../a", "..", ".", "a/b", "a/../b", "./a", "a/", "a/."] {
                let error = confined(Some("/f"), &format!("{key}={path}")).unwrap_err();
                assert!(error.contains("without a folder") && error.contains(path), "{error}");
            }
            let error = confined(None, &format!("{key}=a")).unwrap_err();
            assert!(error.contains("--client-files"), "{error}");
        }
    }

    #[test]
    fn files_that_are_read_are_left_alone() {
        let files = ClientFiles { folder: None, own_user: None };
        for text in ["kvm:kernel=/k,initrd=/i,symbols=/s", "dump:/d", "image:/i", "qemu:qmp=/q", "kvm:elf=/e"]
        {
            let mut spec: MachineSpec = text.parse().unwrap();
            files.confine(&mut spec, &Request::new(())).unwrap();
            assert_eq!(spec, text.parse().unwrap());
        }
    }
}
