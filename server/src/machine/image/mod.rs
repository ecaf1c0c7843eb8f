//! Source `image`: files with guest memory, and a small TOML file that says what they are.
//!
//! A snapshot of Firecracker or cloud-hypervisor, the output of `pmemsave`, a piece of a bug report: wherever the bytes of
//! guest memory are in files, the description names the regions and the registers of each vCPU. [`Description`] is the file, key
//! by key; the daemon writes it as well as it reads it. Memory is mapped, not read. Nothing of an image changes and nothing executes.

mod description;
mod nested;
mod number;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::mapping::FileMapping;
use super::memory::{GuestRam, Place, Region};
use super::{Capabilities, Health, LocalSource, OpenError, regular_file};
use crate::vcpu::{RecordedBackend, Vcpu};
use pagewalk_proto::readable;

pub(crate) use description::OF_MAX;
pub use description::{
    Cpu, Description, DescriptionError, LandmarkEntry, MemoryRegion, Selectors, VcpuEntry, VendorName,
};
pub use nested::{EptEntry, L2Entry, NestedEntry, NptEntry};
pub use number::Number;

/// Longest description that is read: a region takes about a hundred bytes.
const DESCRIPTION_MAX: u64 = 4 << 20;

/// Why an image cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", .file.display())]
pub struct ImageError {
    /// The description.
    pub file: PathBuf,
    /// What is wrong.
    pub problem: ImageProblem,
}

/// What is wrong with an image.
#[derive(Debug, thiserror::Error)]
pub enum ImageProblem {
    /// The description cannot be read.
    #[error("cannot be read: {0}")]
    Read(#[from] std::io::Error),
    /// It is too long.
    #[error("has {0} bytes, where {DESCRIPTION_MAX} are the most: is it the memory itself?")]
    TooLong(u64),
    /// It is no text.
    #[error("is not UTF-8 text: is it the memory itself?")]
    NotText,
    /// It says what cannot be.
    #[error(transparent)]
    Description(#[from] DescriptionError),
    /// A file with memory cannot be read.
    #[error("{key}: {}: {problem}", .memory.display())]
    Memory {
        /// The key that names it.
        key: String,
        /// The file.
        memory: PathBuf,
        /// What is wrong with it.
        problem: std::io::Error,
    },
    /// A region lies beyond the end of its file.
    #[error("{key}: offset {offset:#x} and size {size:#x} end beyond {}, which has {end:#x} bytes", .memory.display())]
    Beyond {
        /// The region.
        key: String,
        /// The file.
        memory: PathBuf,
        /// The region's offset in it.
        offset: u64,
        /// The region's size.
        size: u64,
        /// The file's size.
        end: u64,
    },
    /// Memory cannot be mapped.
    #[error("{0}")]
    Map(String),
}

/// Opens the image that `path` describes.
pub(super) fn open(id: &str, path: &Path) -> Result<LocalSource, OpenError> {
    let fail = |problem| ImageError { file: path.to_owned(), problem };
    let description = read(path).map_err(fail)?;
    let folder = path.parent().unwrap_or_else(|| Path::new(""));
    let memory = Arc::new(memory(&description, folder).map_err(fail)?);
    let reason = "nothing executes in an image: its memory and registers are as they were saved";
    let cpu = description.cpu_profile();
    let vcpus = (0..)
        .zip(&description.vcpus)
        .map(|(index, vcpu)| {
            let (registers, assumed) = vcpu.registers();
            let backend =
                RecordedBackend::new(registers, reason).with_assumed(assumed).with_nested(vcpu.nested());
            Vcpu::spawn(id, index, cpu, backend)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let of = description.of.as_deref().map(|of| format!(": {of}")).unwrap_or_default();
    Ok(LocalSource {
        kind: "image",
        description: readable(&format!("image {}{of}", path.display())),
        vcpus,
        memory,
        capabilities: Capabilities::of_a_record(reason),
        cpu,
        landmarks: description.landmarks(),
        health: Health::default(),
    })
}

fn read(path: &Path) -> Result<Description, ImageProblem> {
    let file = regular_file(path)?;
    let size = file.metadata()?.len();
    if size > DESCRIPTION_MAX {
        return Err(ImageProblem::TooLong(size));
    }
    let mut text = Vec::new();
    std::io::Read::read_to_end(&mut std::io::Read::take(file, DESCRIPTION_MAX), &mut text)?;
    let text = String::from_utf8(text).map_err(|_| ImageProblem::NotText)?;
    Ok(Description::parse(&text)?)
}

/// Maps each file once.
fn memory(description: &Description, folder: &Path) -> Result<GuestRam, ImageProblem> {
    let mut files: BTreeMap<PathBuf, Arc<FileMapping>> = BTreeMap::new();
    let mut regions = Vec::new();
    for (index, region) in description.regions.iter().enumerate() {
        let path = folder.join(&region.file);
        let mapping = match files.get(&path) {
            Some(known) => known,
            None => {
                let unusable = |problem| ImageProblem::Memory {
                    key: format!("region[{index}].file"),
                    memory: path.clone(),
                    problem,
                };
                let file = regular_file(&path).map_err(unusable)?;
                let mapping = FileMapping::of(&file).map_err(unusable)?;
                files.entry(path.clone()).or_insert(mapping)
            }
        };
        let (offset, size, end) = (region.offset.0, region.size.0, mapping.size() as u64);
        if offset.checked_add(size).is_none_or(|last| last > end) {
            let key = format!("region[{index}]");
            return Err(ImageProblem::Beyond { key, memory: path, offset, size, end });
        }
        let start = pagewalk::Gpa(region.gpa.0);
        let region = Region { start, size, read_only: region.read_only };
        regions.push((region, Place::Mapped(Arc::clone(mapping), offset)));
    }
    GuestRam::of_others(regions).map_err(|e| ImageProblem::Map(e.to_string()))
}
