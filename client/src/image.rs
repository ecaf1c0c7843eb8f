//! Saves a machine as an image: two files next to each other, as the daemon streams them.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use pagewalk_proto::v1::{self, save_image_response::Part};

use crate::{Client, Error};

/// What was saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedImage {
    /// The description.
    pub description: PathBuf,
    /// The memory.
    pub memory: PathBuf,
    /// Size of the memory, in bytes.
    pub memory_bytes: u64,
    /// How many of them were sent; the rest are holes.
    pub contents_bytes: u64,
}

/// Why no image was saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The daemon did not answer, or refused.
    #[error(transparent)]
    Daemon(#[from] Error),
    /// A file cannot be written.
    #[error("{}: {problem}", .file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        problem: io::Error,
    },
    /// The daemon's stream is not what the contract says.
    #[error("the daemon's stream is no image: {0}")]
    Stream(String),
}

/// A file under a name of its own until it is whole. It is removed if it does not come to that.
struct Unfinished {
    file: File,
    name: PathBuf,
    part: PathBuf,
}

impl Unfinished {
    fn create(name: &Path) -> Result<Self, SaveError> {
        is_free(name)?;
        let mut part = name.as_os_str().to_owned();
        part.push(".part");
        let part = PathBuf::from(part);
        match File::create_new(&part) {
            Ok(file) => Ok(Self { file, name: name.to_owned(), part }),
            Err(problem) if problem.kind() == ErrorKind::AlreadyExists => Err(exists(
                &part,
                "another save is under way, or one was killed: wait for it, or delete this file",
            )),
            Err(problem) => Err(SaveError::File { file: part, problem }),
        }
    }

    fn fail(&self, problem: io::Error) -> SaveError {
        SaveError::File { file: self.part.clone(), problem }
    }

    /// Whether the part is still this file: somebody may have deleted it, and begun another save.
    fn is_there(&self) -> bool {
        let identity = |data: fs::Metadata| (data.dev(), data.ino());
        match (self.file.metadata(), self.part.symlink_metadata()) {
            (Ok(own), Ok(there)) => identity(own) == identity(there),
            _ => false,
        }
    }

    /// Gives it its name, unless that is taken by now.
    fn finish(&self) -> Result<(), SaveError> {
        self.file.sync_all().map_err(|e| self.fail(e))?;
        if !self.is_there() {
            return Err(self.fail(io::Error::other("was replaced meanwhile: save again")));
        }
        match fs::hard_link(&self.part, &self.name) {
            Err(problem) if problem.kind() == ErrorKind::AlreadyExists => Err(taken(&self.name)),
            // The file system has no hard links: there is a moment between looking and renaming.
            Err(problem)
                if matches!(
                    problem.kind(),
                    ErrorKind::PermissionDenied
                        | ErrorKind::Unsupported
                        | ErrorKind::CrossesDevices
                        | ErrorKind::TooManyLinks
                ) =>
            {
                is_free(&self.name)?;
                fs::rename(&self.part, &self.name).map_err(|e| self.fail(e))
            }
            linked => linked.map_err(|e| self.fail(e)),
        }
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if self.is_there() {
            // Where it is whole, it has its name.
            let _ = fs::remove_file(&self.part);
        }
    }
}

fn is_free(name: &Path) -> Result<(), SaveError> {
    // A link that leads nowhere takes a name, too.
    match name.symlink_metadata() {
        Ok(_) => Err(taken(name)),
        Err(problem) if problem.kind() == ErrorKind::NotFound => Ok(()),
        Err(problem) => Err(SaveError::File { file: name.to_owned(), problem }),
    }
}

fn taken(name: &Path) -> SaveError {
    exists(name, "remove it, or save under another name")
}

fn exists(file: &Path, advice: &str) -> SaveError {
    let problem = io::Error::new(ErrorKind::AlreadyExists, format!("exists already: {advice}"));
    SaveError::File { file: file.to_owned(), problem }
}

impl Client {
    /// Saves `machine` (empty: the only one) as the description `file` and, next to it, the memory: the same name with `.mem`
    /// instead of its extension. `progress` hears where in the memory the daemon is, and how large it is, in bytes. A guest
    /// that runs is paused meanwhile.
    ///
    /// Nothing is written over, and nothing stays behind unless the image is whole. Until then the files have `.part` behind
    /// their names; where there is such a file, another save may be under way, and this one is refused.
    ///
    /// # Errors
    /// If the daemon cannot be reached, refuses, or sends nothing for as long as a call may take; if a file exists already or
    /// cannot be written.
    pub async fn save_image(
        &self,
        machine: &str,
        file: &Path,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<SavedImage, SaveError> {
        let memory_name = file.with_extension("mem");
        let memory_file =
            memory_name.file_name().and_then(|name| name.to_str()).filter(|_| memory_name != file);
        let Some(memory_file) = memory_file else {
            let problem = io::Error::other("is no name for a description, such as guest.toml");
            return Err(SaveError::File { file: file.to_owned(), problem });
        };
        let description = Unfinished::create(file)?;
        let memory = Unfinished::create(&memory_name)?;
        let request =
            v1::SaveImageRequest { machine: machine.to_owned(), memory_file: memory_file.to_owned() };
        let mut parts = self.image_parts(request).await?;

        let (mut size, mut received) = (None, 0);
        let out_of_order = |what: &str| SaveError::Stream(format!("{what} where it does not belong"));
        while let Some(part) = parts.next().await? {
            match (part.part, size) {
                (Some(Part::Start(start)), None) => {
                    (&description.file)
                        .write_all(start.description.as_bytes())
                        .map_err(|e| description.fail(e))?;
                    memory.file.set_len(start.memory_file_bytes).map_err(|e| memory.fail(e))?;
                    size = Some(start.memory_file_bytes);
                    progress(0, start.memory_file_bytes);
                }
                (Some(Part::Piece(piece)), Some(size)) => {
                    let length = piece.contents.len() as u64;
                    let end =
                        piece.offset.checked_add(length).filter(|end| *end <= size).ok_or_else(|| {
                            SaveError::Stream(format!(
                                "a piece of {length} bytes at {:#x}, in a memory of {size:#x}",
                                piece.offset
                            ))
                        })?;
                    memory.file.write_all_at(&piece.contents, piece.offset).map_err(|e| memory.fail(e))?;
                    received += length;
                    progress(end, size);
                }
                (Some(Part::End(end)), Some(size)) => {
                    if end.contents_bytes != received {
                        return Err(SaveError::Stream(format!(
                            "{received} bytes came, and {} were sent",
                            end.contents_bytes
                        )));
                    }
                    progress(size, size);
                    // The description last: where it is, the image is whole.
                    memory.finish()?;
                    if let Err(error) = description.finish() {
                        let _ = fs::remove_file(&memory_name);
                        return Err(error);
                    }
                    return Ok(SavedImage {
                        description: file.to_owned(),
                        memory: memory_name,
                        memory_bytes: size,
                        contents_bytes: received,
                    });
                }
                (Some(Part::Start(_)), Some(_)) => return Err(out_of_order("a start")),
                (Some(Part::Piece(_)), None) => return Err(out_of_order("a piece")),
                (Some(Part::End(_)), None) => return Err(out_of_order("an end")),
                (None, _) => return Err(SaveError::Stream("a part that this client does not know".into())),
            }
        }
        Err(SaveError::Stream("it ended before the image was whole".into()))
    }
}
