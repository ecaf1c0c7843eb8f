//! BTF: the types that a Linux kernel was built of, as it carries them in its own memory.
//!
//! Documentation/bpf/btf.rst. A header, then types, one behind the other and numbered from 1, then strings. Of all that only
//! where a member lies in its structure is wanted. The blob is the guest's, and believed nothing: what it says of lengths and
//! numbers is held against the bytes that there are, and every chain of types has an end.

use std::ops::Range;

const MAGIC: u16 = 0xeb9f;
const HEADER: usize = 24;
/// Name, information, and size or type.
const RECORD: usize = 12;
const MEMBER: usize = 12;
/// Types that lead from one to the next, and structures inside of structures.
const DEEP: u32 = 16;
/// Members that are looked at for one that is wanted.
const LOOKED_AT: u32 = 1 << 16;

const KIND_INT: u32 = 1;
const KIND_PTR: u32 = 2;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;

/// Where a member lies in its structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Member {
    /// Offset in bytes.
    pub(super) offset: u64,
    /// Size in bytes.
    pub(super) size: u64,
}

/// Types, all of which lie in the bytes.
pub(super) struct Btf {
    bytes: Vec<u8>,
    /// Where each type's record begins, from type 1 on.
    types: Vec<u32>,
    strings: Range<usize>,
    pointer: u64,
}

/// The fixed part of a type.
struct Record {
    name: u32,
    kind: u32,
    count: usize,
    /// Offsets of members are of bits, and have the width of a bit field above.
    bit_fields: bool,
    size_or_type: u32,
    /// Where what is peculiar to the kind begins.
    rest: usize,
}

impl Btf {
    /// Takes in the blob of a kernel whose pointers have this size.
    pub(super) fn new(bytes: Vec<u8>, pointer: u64) -> Result<Self, String> {
        let word = |at| word(&bytes, at).ok_or("is cut off in its header");
        let head = word(0)?;
        if head & 0xffff != u32::from(MAGIC) {
            return Err(format!("begins with {:#06x} instead of {MAGIC:#06x}", head & 0xffff));
        }
        if head >> 16 & 0xff != 1 {
            return Err(format!("is of version {}, and 1 is known", head >> 16 & 0xff));
        }
        let header = word(4)? as usize;
        let section = |at: usize, what: &str| {
            let start = (word(at)? as usize).checked_add(header).filter(|_| header >= HEADER);
            let end = start.and_then(|start| start.checked_add(word(at + 4).ok()? as usize));
            match (start, end) {
                (Some(start), Some(end)) if end <= bytes.len() => Ok(start..end),
                _ => Err(format!("says that its {what} lie outside its {} bytes", bytes.len())),
            }
        };
        let (types, strings) = (section(8, "types")?, section(16, "strings")?);
        let mut btf = Self { types: Vec::new(), strings, pointer, bytes };
        let mut at = types.start;
        while at < types.end {
            let number = btf.types.len() + 1;
            let size = btf.record_at(at).and_then(|record| Some((record.rest - at) + extra(&record)?));
            let end = size.map(|size| at + size).filter(|end| *end <= types.end);
            let Some(end) = end else {
                return Err(format!("has no sound type {number}, at its byte {at:#x}"));
            };
            btf.types.push(at as u32);
            at = end;
        }
        Ok(btf)
    }

    fn record_at(&self, at: usize) -> Option<Record> {
        let [name, info, size_or_type] = [0, 4, 8].map(|offset| word(&self.bytes, at + offset));
        let info = info?;
        Some(Record {
            name: name?,
            kind: info >> 24 & 0x1f,
            count: (info & 0xffff) as usize,
            bit_fields: info >> 31 == 1,
            size_or_type: size_or_type?,
            rest: at + RECORD,
        })
    }

    fn record(&self, number: u32) -> Option<Record> {
        self.record_at(*self.types.get((number as usize).checked_sub(1)?)? as usize)
    }

    fn is_named(&self, name: u32, wanted: &str) -> bool {
        let found = self.bytes.get(self.strings.clone()).and_then(|strings| strings.get(name as usize..));
        found.is_some_and(|found| found.starts_with(wanted.as_bytes()) && found.get(wanted.len()) == Some(&0))
    }

    /// Where `wanted` lies in `structure`, if all structures of that name say the same.
    pub(super) fn member(&self, structure: &str, wanted: &str) -> Result<Member, String> {
        let (mut found, mut left) = (None, LOOKED_AT);
        for at in &self.types {
            let Some(record) = self.record_at(*at as usize) else { continue };
            if record.kind != KIND_STRUCT || record.count == 0 || !self.is_named(record.name, structure) {
                continue;
            }
            let member = self.member_of(&record, wanted, 0, &mut left);
            let member = member.ok_or_else(|| format!("has no `{structure}.{wanted}` of whole bytes"))?;
            if found.replace(member).is_some_and(|other| other != member) {
                return Err(format!("has several `{structure}`, which differ in `{wanted}`"));
            }
        }
        found.ok_or_else(|| format!("has no `struct {structure}`"))
    }

    /// A member, which may lie in members without names.
    fn member_of(&self, record: &Record, wanted: &str, depth: u32, left: &mut u32) -> Option<Member> {
        if depth >= DEEP {
            return None;
        }
        for number in 0..record.count {
            *left = left.checked_sub(1)?;
            let at = record.rest + number * MEMBER;
            let [name, kind, offset] = [0, 4, 8].map(|field| word(&self.bytes, at + field));
            let (name, kind, mut bits) = (name?, kind?, u64::from(offset?));
            let bit_field = record.bit_fields && bits >> 24 != 0;
            if record.bit_fields {
                bits &= 0xff_ffff;
            }
            if self.is_named(name, wanted) {
                let whole = bits % 8 == 0 && !bit_field;
                return whole.then_some(Member { offset: bits / 8, size: self.size(kind)? });
            }
            if !self.is_named(name, "") {
                continue;
            }
            let inner = self.record(kind).filter(|inner| matches!(inner.kind, KIND_STRUCT | KIND_UNION));
            let inside = inner.and_then(|inner| self.member_of(&inner, wanted, depth + 1, left));
            if let Some(member) = inside.filter(|_| bits % 8 == 0) {
                return Some(Member { offset: member.offset + bits / 8, ..member });
            }
        }
        None
    }

    fn size(&self, mut number: u32) -> Option<u64> {
        let mut times = 1u64;
        for _ in 0..DEEP {
            let record = self.record(number)?;
            let size = match record.kind {
                KIND_PTR => self.pointer,
                KIND_ARRAY => {
                    times = times.checked_mul(u64::from(word(&self.bytes, record.rest + 8)?))?;
                    number = word(&self.bytes, record.rest)?;
                    continue;
                }
                // Numbers, structures, enumerations.
                KIND_INT | KIND_STRUCT | KIND_UNION | 6 | 16 | 19 => u64::from(record.size_or_type),
                // Other names of types.
                8..=11 | 18 => {
                    number = record.size_or_type;
                    continue;
                }
                _ => return None,
            };
            return times.checked_mul(size);
        }
        None
    }
}

/// Bytes behind the fixed part of a type.
fn extra(record: &Record) -> Option<usize> {
    Some(match record.kind {
        // Numbers, variables, and tags of declarations.
        KIND_INT | 14 | 17 => 4,
        KIND_ARRAY => 12,
        // Structures, unions, sections of data, enumerations of 64 bits.
        KIND_STRUCT | KIND_UNION | 15 | 19 => record.count * MEMBER,
        // Enumerations, and prototypes of functions.
        6 | 13 => record.count * 8,
        // Pointers, forward declarations, other names, functions, floating point.
        KIND_PTR | 7..=12 | 16 | 18 => 0,
        _ => return None,
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_le_bytes(*bytes))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test")]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A blob in the making.
    #[derive(Default)]
    pub(in crate::tasks) struct Blob {
        types: Vec<u8>,
        strings: Vec<u8>,
        count: u32,
    }

    pub(in crate::tasks) const STRUCT: u32 = KIND_STRUCT;

    impl Blob {
        fn string(&mut self, text: &str) -> u32 {
            if self.strings.is_empty() {
                self.strings.push(0);
            }
            if text.is_empty() {
                return 0;
            }
            let at = self.strings.len();
            self.strings.extend(text.bytes().chain([0]));
            at as u32
        }

        /// Adds a type, and answers its number.
        pub(in crate::tasks) fn add(
            &mut self,
            name: &str,
            kind: u32,
            count: u32,
            size: u32,
            rest: &[u32],
        ) -> u32 {
            let name = self.string(name);
            let fixed = [name, (kind << 24) | count, size];
            self.types.extend(fixed.iter().chain(rest).flat_map(|word| word.to_le_bytes()));
            self.count += 1;
            self.count
        }

        /// Adds a structure of members by name, type and offset in bytes.
        pub(in crate::tasks) fn structure(&mut self, name: &str, members: &[(&str, u32, u32)]) -> u32 {
            let rest: Vec<u32> = members
                .iter()
                .flat_map(|(name, kind, offset)| [self.string(name), *kind, offset * 8])
                .collect();
            self.add(name, STRUCT, members.len() as u32, 0x1000, &rest)
        }

        pub(in crate::tasks) fn bytes(&self) -> Vec<u8> {
            let (types, strings) = (self.types.len() as u32, self.strings.len() as u32);
            let header = [0x0001_eb9f, HEADER as u32, 0, types, types, strings];
            let header = header.iter().flat_map(|word| word.to_le_bytes());
            header.chain(self.types.iter().copied()).chain(self.strings.iter().copied()).collect()
        }
    }

    fn sample() -> Blob {
        let mut blob = Blob::default();
        let int = blob.add("int", KIND_INT, 0, 4, &[32]);
        let named = blob.add("pid_t", 8, 0, int, &[]);
        let pointer = blob.add("", KIND_PTR, 0, 0, &[]);
        let array = blob.add("", KIND_ARRAY, 0, 0, &[int, int, 4]);
        let inner = blob.structure("", &[("deep", pointer, 16), ("odd", int, 8)]);
        let union = blob.add("", KIND_UNION, 1, 8, &[0, inner, 0]);
        blob.structure("outer", &[("pid", named, 4), ("", union, 64), ("names", array, 128)]);
        blob
    }

    #[test]
    fn members_are_found_wherever_they_lie() {
        let btf = Btf::new(sample().bytes(), 8).unwrap();
        let member = |name| btf.member("outer", name);
        assert_eq!(member("pid"), Ok(Member { offset: 4, size: 4 }));
        assert_eq!(member("deep"), Ok(Member { offset: 80, size: 8 }));
        assert_eq!(member("names"), Ok(Member { offset: 128, size: 16 }));
        assert!(member("nothing").unwrap_err().contains("`outer.nothing`"));
        assert!(btf.member("inner", "pid").unwrap_err().contains("struct inner"));
    }

    #[test]
    fn types_that_lead_to_themselves_have_an_end() {
        let mut blob = Blob::default();
        let own = blob.count + 1;
        blob.structure("", &[("", own, 0), ("", own, 8)]);
        let name = blob.count + 1;
        blob.add("name", 8, 0, name, &[]);
        blob.structure("outer", &[("", own, 0), ("loop", name, 0)]);
        let btf = Btf::new(blob.bytes(), 8).unwrap();
        assert!(btf.member("outer", "loop").is_err() && btf.member("outer", "other").is_err());
    }

    #[test]
    fn structures_that_differ_are_not_chosen_from() {
        let mut blob = sample();
        blob.structure("outer", &[("pid", 1, 8)]);
        let btf = Btf::new(blob.bytes(), 8).unwrap();
        assert!(btf.member("outer", "pid").unwrap_err().contains("differ"));
    }

    #[test]
    fn what_is_no_btf_is_refused() {
        let sound = sample().bytes();
        let put = |at: usize, word: u32| {
            let mut bytes = sound.clone();
            bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
            bytes
        };
        for (bytes, said) in [
            (vec![], "cut off"),
            (vec![0x41; 4096], "begins with 0x4141"),
            (put(0, 0x0002_eb9f), "version 2"),
            (put(4, 8), "types lie outside"),
            (put(4, u32::MAX), "types lie outside"),
            // As many types as there can be numbers of them.
            (put(12, u32::MAX), "types lie outside"),
            (put(8, u32::MAX), "types lie outside"),
            (put(20, u32::MAX), "strings lie outside"),
            (put(12, 13), "no sound type 1"),
            (put(HEADER + 4, 31 << 24), "no sound type 1"),
            (put(HEADER + 4, (KIND_STRUCT << 24) | 0xffff), "no sound type 1"),
        ] {
            let refused = Btf::new(bytes, 8).err().unwrap();
            assert!(refused.contains(said), "{said:?} is missing in {refused:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_to_the_end(
            changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..8),
            cut in any::<proptest::sample::Index>(),
        ) {
            let mut bytes = sample().bytes();
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            bytes.truncate(bytes.len() - cut.index(bytes.len()) / 8);
            if let Ok(btf) = Btf::new(bytes, 8) {
                for name in ["pid", "deep", "names", "nothing"] {
                    let _ = btf.member("outer", name);
                }
            }
        }
    }
}
