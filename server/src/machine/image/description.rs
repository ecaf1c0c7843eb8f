//! The description of an image: its TOML, key by key.
//!
//! What it does not know is an error, and so is what contradicts itself; each names the key. Registers that are left out are
//! zero if no walk depends on them; of those that a walk does depend on, CR0, CR3, CR4 and EFER have to be there, and the rest
//! is assumed and named in `assumed`.

use std::collections::BTreeMap;
use std::ops::Range;

use pagewalk::mode::PAT_RESET;
use pagewalk::{ControlRegisters, CpuProfile, PageWalk, Vendor};
use serde::{Deserialize, Serialize};

use super::nested::NestedEntry;
use super::number::Number;
use crate::machine::{Landmark, PAGE};
use crate::vcpu::{self, NestedMode, Registers, Snapshot};
use pagewalk_proto::readable;

const REGIONS_MAX: usize = 4096;
const VCPUS_MAX: usize = 1024;
/// Longest `of`. Texts are measured as they are shown, where an escape takes up to eight bytes.
pub(crate) const OF_MAX: usize = 512;
const LANDMARKS_MAX: usize = 4096;
const LANDMARK_NAME_MAX: usize = 64;
const LANDMARK_DESCRIPTION_MAX: usize = 256;
const ASSUMED_MAX: usize = 64;
const ASSUMED_LENGTH_MAX: usize = 256;

/// What is wrong with a description.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DescriptionError {
    /// It is no TOML, lacks a key, or has one that is not known.
    #[error("is no description of an image: {0}")]
    Toml(String),
    /// A key has a value that cannot be.
    #[error("{key}: {problem}")]
    Key {
        /// The key.
        key: String,
        /// What is wrong with its value.
        problem: String,
    },
    /// Two regions share an address.
    #[error("region[{first}] and region[{second}] overlap: both have {gpa:#x}")]
    Overlap {
        /// The one.
        first: usize,
        /// The other.
        second: usize,
        /// The first address that both have.
        gpa: u64,
    },
}

/// A whole description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub struct Description {
    /// Version of this format: 1.
    pub version: u32,
    /// What it is an image of, for a person: at most 512 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of: Option<String>,
    /// The CPU, as far as paging depends on it.
    pub cpu: Cpu,
    /// Memory. At least one region.
    #[serde(rename = "region")]
    pub regions: Vec<MemoryRegion>,
    /// The vCPUs, from 0. At least one.
    #[serde(rename = "vcpu")]
    pub vcpus: Vec<VcpuEntry>,
    /// Addresses worth asking about, at most 4096.
    #[serde(rename = "landmark", default, skip_serializing_if = "Vec::is_empty")]
    pub landmarks: Vec<LandmarkEntry>,
}

/// What CPUID says that the meaning of an entry depends on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cpu {
    /// `intel` or `amd`.
    pub vendor: VendorName,
    /// MAXPHYADDR in bits, 32 to 52.
    pub maxphyaddr: u8,
    /// Whether a PDPTE may map a 1 GiB page. Default: yes.
    #[serde(default = "yes")]
    pub gib_pages: bool,
    /// Position of the bit that marks memory as encrypted, 47 to 51. Default: there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption_bit: Option<u8>,
}

/// Who made the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VendorName {
    /// Intel, and those who follow it.
    Intel,
    /// AMD and Hygon.
    Amd,
}

/// A region of memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryRegion {
    /// Guest physical address of its first byte, 4 KiB-aligned.
    pub gpa: Number,
    /// Size in bytes, a multiple of 4 KiB.
    pub size: Number,
    /// The file with its bytes, relative to the description's folder. Regions may share one.
    pub file: String,
    /// Offset of its first byte in the file; a multiple of 8 is walked faster. Default: 0.
    #[serde(default)]
    pub offset: Number,
    /// The guest can read but not write it. Default: false.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
}

macro_rules! vcpu_entry {
    ($($(#[$doc:meta])* $register:ident),* $(,)?) => {
        /// The registers of a vCPU.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct VcpuEntry {
            /// CR0.
            pub cr0: Number,
            /// CR3.
            pub cr3: Number,
            /// CR4.
            pub cr4: Number,
            /// IA32_EFER.
            pub efer: Number,
            /// IA32_PAT. Default: as after reset, named in `assumed`.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub pat: Option<Number>,
            /// PKRU. Default: 0, named in `assumed` where it matters.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub pkru: Option<Number>,
            /// IA32_PKRS. Default: 0, named in `assumed` where it matters.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub pkrs: Option<Number>,
            /// Current privilege level, 0 to 3. Default: that of the selector CS, and 0 without protected mode.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub cpl: Option<u8>,
            /// The four PDPTE registers, for PAE paging. Default: as in memory at CR3.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub pdptes: Option<[Number; 4]>,
            /// What of it was not known when it was recorded, but assumed: `EFER=0xd00`. Default: nothing.
            #[serde(default, skip_serializing_if = "Vec::is_empty")]
            pub assumed: Vec<String>,
            $($(#[$doc])* #[serde(default)] pub $register: Number,)*
            /// Visible parts of the segment registers. Default: 0.
            #[serde(default)]
            pub selectors: Selectors,
            /// The second dimension under its walk. Default: there is none.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub nested: Option<NestedEntry>,
        }

        impl VcpuEntry {
            /// What is recorded of a vCPU.
            #[must_use]
            pub fn of(snapshot: &Snapshot) -> Self {
                let registers = &snapshot.registers;
                let Registers { cr0, cr3, cr4, efer, pat, pkru, pkrs, cpl, pdptes, .. } = *registers;
                let vcpu::Selectors { cs, ss, ds, es, fs, gs } = registers.selectors;
                Self {
                    cr0: Number(cr0),
                    cr3: Number(cr3),
                    cr4: Number(cr4),
                    efer: Number(efer),
                    pat: Some(Number(pat)),
                    pkru: pkru.map(|pkru| Number(pkru.into())),
                    pkrs: pkrs.map(|pkrs| Number(pkrs.into())),
                    cpl: Some(cpl),
                    pdptes: pdptes.map(|pdptes| pdptes.map(Number)),
                    $($register: Number(registers.$register),)*
                    selectors: Selectors { cs, ss, ds, es, fs, gs },
                    assumed: snapshot.assumed.clone(),
                    nested: NestedEntry::of(&snapshot.nested),
                }
            }

            /// The registers, and what of them was assumed.
            #[must_use]
            pub fn registers(&self) -> (Registers, Vec<String>) {
                let Selectors { cs, ss, ds, es, fs, gs } = self.selectors;
                let mut assumed = self.assumed.clone();
                let pat = self.pat.map_or_else(|| {
                    assumed.push(format!("PAT={PAT_RESET:#x}"));
                    PAT_RESET
                }, |pat| pat.0);
                let protected = self.cr0.0 & pagewalk::mode::CR0_PE != 0;
                let registers = Registers {
                    cr0: self.cr0.0,
                    cr3: self.cr3.0,
                    cr4: self.cr4.0,
                    efer: self.efer.0,
                    pat,
                    // The ranges are checked when the description is.
                    pkru: self.pkru.map(|pkru| pkru.0 as u32),
                    pkrs: self.pkrs.map(|pkrs| pkrs.0 as u32),
                    cpl: self.cpl.unwrap_or(if protected { (cs & 3) as u8 } else { 0 }),
                    pdptes: self.pdptes.map(|pdptes| pdptes.map(|pdpte| pdpte.0)),
                    $($register: self.$register.0,)*
                    selectors: vcpu::Selectors { cs, ss, ds, es, fs, gs },
                };
                (registers, assumed)
            }
        }
    };
}

vcpu_entry! {
    /// CR2. Default: 0.
    cr2,
    /// CR8. Default: 0.
    cr8,
    /// RIP. Default: 0.
    rip,
    /// RFLAGS; AC in it (bit 18) decides over accesses under SMAP. Default: 0.
    rflags,
    /// RAX. Default: 0.
    rax,
    /// RBX. Default: 0.
    rbx,
    /// RCX. Default: 0.
    rcx,
    /// RDX. Default: 0.
    rdx,
    /// RSI. Default: 0.
    rsi,
    /// RDI. Default: 0.
    rdi,
    /// RBP. Default: 0.
    rbp,
    /// RSP. Default: 0.
    rsp,
    /// R8. Default: 0.
    r8,
    /// R9. Default: 0.
    r9,
    /// R10. Default: 0.
    r10,
    /// R11. Default: 0.
    r11,
    /// R12. Default: 0.
    r12,
    /// R13. Default: 0.
    r13,
    /// R14. Default: 0.
    r14,
    /// R15. Default: 0.
    r15,
    /// Base of FS. Default: 0.
    fs_base,
    /// Base of GS. Default: 0.
    gs_base,
}

/// Visible parts of the segment registers, all 0 by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Selectors {
    /// CS.
    pub cs: u16,
    /// SS.
    pub ss: u16,
    /// DS.
    pub ds: u16,
    /// ES.
    pub es: u16,
    /// FS.
    pub fs: u16,
    /// GS.
    pub gs: u16,
}

/// An address worth asking about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LandmarkEntry {
    /// Short name, unique in the image: at most 64 bytes.
    pub name: String,
    /// The guest virtual address; for names that end in `cr3`, a value of that register.
    pub address: Number,
    /// What is to be seen there, in at most 256 bytes. Default: nothing.
    #[serde(default)]
    pub description: String,
}

fn yes() -> bool {
    true
}

/// Refuses a text that takes more than `most` bytes to show.
fn short(name: impl Into<String>, text: &str, most: usize) -> Result<(), DescriptionError> {
    match readable(text).len() {
        size if size > most => {
            Err(key(name, format!("takes {size} bytes to show, where {most} are the most")))
        }
        _ => Ok(()),
    }
}

fn key(key: impl Into<String>, problem: impl Into<String>) -> DescriptionError {
    DescriptionError::Key { key: key.into(), problem: problem.into() }
}

impl Description {
    /// The only version there is.
    pub const VERSION: u32 = 1;

    /// Reads a description, and checks all that can be without its files.
    ///
    /// # Errors
    /// Names the key.
    pub fn parse(text: &str) -> Result<Self, DescriptionError> {
        // TOML's own errors point into the text, on several lines.
        let description: Self = toml::from_str(text).map_err(|e| {
            let line = e.span().map(|Range { start, .. }| {
                format!("line {}: ", text.get(..start).unwrap_or_default().matches('\n').count() + 1)
            });
            // They quote the text as well.
            DescriptionError::Toml(format!("{}{}", line.unwrap_or_default(), readable(e.message())))
        })?;
        description.check()?;
        Ok(description)
    }

    /// Writes the description.
    ///
    /// # Errors
    /// When a value cannot be written as TOML.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }

    fn check(&self) -> Result<(), DescriptionError> {
        if self.version != Self::VERSION {
            return Err(key(
                "version",
                format!("{} is not known: {} is the only one", self.version, Self::VERSION),
            ));
        }
        let bounded = |what, count, most| match count {
            0 => Err(key(what, "there has to be at least one")),
            _ if count > most => Err(key(what, format!("there are {count}, where {most} are the most"))),
            _ => Ok(()),
        };
        short("of", self.of.as_deref().unwrap_or_default(), OF_MAX)?;
        bounded("region", self.regions.len(), REGIONS_MAX)?;
        bounded("vcpu", self.vcpus.len(), VCPUS_MAX)?;
        if self.landmarks.len() > LANDMARKS_MAX {
            bounded("landmark", self.landmarks.len(), LANDMARKS_MAX)?;
        }
        self.check_landmarks()?;
        self.check_regions()?;
        let cpu = self.cpu_profile();
        if let Err(problem) = PageWalk::new(&ControlRegisters::default(), &cpu) {
            return Err(key("cpu", problem.to_string()));
        }
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            vcpu.check(&format!("vcpu[{index}]"), &cpu)?;
        }
        Ok(())
    }

    fn check_landmarks(&self) -> Result<(), DescriptionError> {
        let mut names = BTreeMap::new();
        for (index, LandmarkEntry { name, description, .. }) in self.landmarks.iter().enumerate() {
            short(format!("landmark[{index}].name"), name, LANDMARK_NAME_MAX)?;
            short(format!("landmark[{index}].description"), description, LANDMARK_DESCRIPTION_MAX)?;
            if let Some(other) = names.insert(name, index) {
                let problem = format!("landmark[{other}] is `{}`, too: names are unique", readable(name));
                return Err(key(format!("landmark[{index}].name"), problem));
            }
        }
        Ok(())
    }

    fn check_regions(&self) -> Result<(), DescriptionError> {
        let physical = 1_u64 << self.cpu.maxphyaddr.clamp(32, 52);
        let mut ranges = Vec::new();
        for (index, MemoryRegion { gpa, size, file, offset, .. }) in self.regions.iter().enumerate() {
            let name = |part: &str| format!("region[{index}].{part}");
            if gpa.0 % PAGE != 0 {
                return Err(key(name("gpa"), format!("{:#x} is not 4 KiB-aligned", gpa.0)));
            }
            if size.0 == 0 || size.0 % PAGE != 0 {
                return Err(key(name("size"), format!("{:#x} is not made of whole 4 KiB pages", size.0)));
            }
            let end = gpa.0.checked_add(size.0).filter(|end| *end <= physical).ok_or_else(|| {
                let bits = self.cpu.maxphyaddr;
                key(
                    name("size"),
                    format!("{:#x}+{:#x} does not fit into {bits} bits of address", gpa.0, size.0),
                )
            })?;
            if offset.0.checked_add(size.0).is_none() {
                return Err(key(name("offset"), format!("{:#x} is beyond any file", offset.0)));
            }
            if file.is_empty() {
                return Err(key(name("file"), "is empty"));
            }
            ranges.push((gpa.0, end, index));
        }
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            if let [(_, end, first), (gpa, _, second)] = *pair
                && gpa < end
            {
                return Err(DescriptionError::Overlap { first, second, gpa });
            }
        }
        Ok(())
    }

    /// The CPU.
    #[must_use]
    pub fn cpu_profile(&self) -> CpuProfile {
        let Cpu { vendor, maxphyaddr, gib_pages, encryption_bit } = self.cpu;
        let vendor = match vendor {
            VendorName::Intel => Vendor::Intel,
            VendorName::Amd => Vendor::Amd,
        };
        CpuProfile { vendor, maxphyaddr, gib_pages, encryption_bit }
    }

    /// The landmarks.
    #[must_use]
    pub fn landmarks(&self) -> Vec<Landmark> {
        let landmark = |entry: &LandmarkEntry| Landmark {
            name: entry.name.clone(),
            address: entry.address.0,
            description: entry.description.clone(),
        };
        self.landmarks.iter().map(landmark).collect()
    }
}

impl LandmarkEntry {
    /// What is recorded of a landmark.
    #[must_use]
    pub fn of(landmark: &Landmark) -> Self {
        let Landmark { name, address, description } = landmark;
        Self { name: name.clone(), address: Number(*address), description: description.clone() }
    }
}

impl Cpu {
    /// What is recorded of a CPU.
    #[must_use]
    pub fn of(cpu: &CpuProfile) -> Self {
        let CpuProfile { vendor, maxphyaddr, gib_pages, encryption_bit } = *cpu;
        let vendor = match vendor {
            Vendor::Intel => VendorName::Intel,
            Vendor::Amd => VendorName::Amd,
        };
        Self { vendor, maxphyaddr, gib_pages, encryption_bit }
    }
}

impl VcpuEntry {
    /// Its nested mode.
    #[must_use]
    pub fn nested(&self) -> NestedMode {
        // Whether it is one is checked when the description is.
        self.nested.as_ref().and_then(|nested| nested.mode().ok()).unwrap_or_default()
    }

    fn check(&self, name: &str, cpu: &CpuProfile) -> Result<(), DescriptionError> {
        if let Some(cpl) = self.cpl.filter(|cpl| *cpl > 3) {
            return Err(key(format!("{name}.cpl"), format!("{cpl} is no privilege level: 0 to 3 are")));
        }
        for (register, value) in [("pkru", self.pkru), ("pkrs", self.pkrs)] {
            if let Some(Number(value)) = value.filter(|value| value.0 > u32::MAX.into()) {
                return Err(key(format!("{name}.{register}"), format!("{value:#x} has more than 32 bits")));
            }
        }
        let said =
            |assumed: &String| assumed.len() <= ASSUMED_LENGTH_MAX && !assumed.contains(char::is_control);
        if self.assumed.len() > ASSUMED_MAX || !self.assumed.iter().all(said) {
            let problem = format!(
                "at most {ASSUMED_MAX} lines of {ASSUMED_LENGTH_MAX} bytes, without control characters"
            );
            return Err(key(format!("{name}.assumed"), problem));
        }
        let (registers, _) = self.registers();
        registers.gva_walk(cpu).map_err(|problem| key(name, problem.to_string()))?;
        if let Some(nested) = &self.nested {
            let name = format!("{name}.nested");
            let mode = nested.mode().map_err(|problem| key(name.clone(), problem))?;
            mode.walker(registers.control(), cpu).map_err(|problem| key(name, problem.to_string()))?;
        }
        Ok(())
    }
}
