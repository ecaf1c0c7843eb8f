//! From those words to what they ask for.

use std::path::PathBuf;
use std::str::FromStr;

use super::super::pages::HugePages;
use super::super::{LinuxSpec, kvm, linux};
use super::{ID_MAX, KvmGuest, MachineSpec, SourceSpec, SpecError};

const MEMORY_MIN: u64 = 1 << 20;
const MEMORY_DEFAULT: u64 = 64 << 20;
const MEMORY_DEFAULT_LINUX: u64 = 512 << 20;

impl FromStr for MachineSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        // An id has neither `:` nor `,`, so the `=` of an option is never taken for the one after an id.
        let (id, spec) = match text.split_once('=') {
            Some((id, spec)) if !id.contains([':', ',']) => (Some(id), spec),
            _ => (None, text),
        };
        let (kind, options) = match (spec.strip_prefix("demo,"), spec.split_once(':')) {
            // It needs no option, so that the first one may come where others have their second.
            (Some(options), _) => ("demo", Some(options)),
            (None, Some((kind, options))) => (kind, Some(options)),
            (None, None) => (spec, None),
        };
        let (options, symbols) = match options {
            Some(options) => take_symbols(options)?,
            None => (None, None),
        };
        let source = match (kind, options.as_deref()) {
            ("demo", None) => SourceSpec::Demo { plain: false },
            ("demo", Some("plain")) => SourceSpec::Demo { plain: true },
            ("demo", Some(key)) => {
                return Err(SpecError::Key { source_kind: "demo", key: key.to_owned(), known: "plain" });
            }
            ("kvm", options) => parse_kvm(options.unwrap_or_default())?,
            ("dump", file) => SourceSpec::Dump(parse_file("dump", file)?),
            ("image", file) => SourceSpec::Image(parse_file("image", file)?),
            ("qemu", options) => parse_qemu(options.unwrap_or_default())?,
            _ => return Err(SpecError::Source(spec.to_owned())),
        };
        let id = id.unwrap_or(kind);
        let valid = id.len() <= ID_MAX
            && id.starts_with(|c: char| c.is_ascii_alphanumeric())
            && id.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
        if !valid {
            return Err(SpecError::Id(id.to_owned()));
        }
        Ok(Self { id: id.to_owned(), source, symbols })
    }
}

/// What is left of the options without `symbols=FILE`, and the file.
fn take_symbols(options: &str) -> Result<(Option<String>, Option<PathBuf>), SpecError> {
    const KEY: &str = "symbols=";
    let separated = format!(",{KEY}");
    let (before, after) = match options.strip_prefix(KEY) {
        Some(after) => ("", after),
        None => {
            // Two commas stand for one in a value of `kvm:`, such as the kernel's command line.
            let commas = |at: usize| options[..=at].bytes().rev().take_while(|byte| *byte == b',').count();
            match options.match_indices(&separated).find(|(at, _)| commas(*at) % 2 == 1) {
                Some((at, _)) => (&options[..at], &options[at + separated.len()..]),
                None => return Ok((Some(options.to_owned()), None)),
            }
        }
    };
    let (file, behind) = after.split_once(',').unwrap_or((after, ""));
    if file.is_empty() {
        return Err(SpecError::NoSymbols);
    }
    if take_symbols(behind)?.1.is_some() {
        return Err(SpecError::Twice("symbols".to_owned()));
    }
    let left: Vec<&str> = [before, behind].into_iter().filter(|part| !part.is_empty()).collect();
    Ok(((!left.is_empty()).then(|| left.join(",")), Some(file.into())))
}

fn parse_kvm(options: &str) -> Result<SourceSpec, SpecError> {
    const PATHS: [&str; 5] = ["elf", "kernel", "initrd", "console", "log"];
    let mut paths: [Option<PathBuf>; PATHS.len()] = Default::default();
    let (mut command_line, mut memory, mut cpus, mut pages) = (None, None, None, None);
    for option in split_options(options) {
        let (key, value) = option.split_once('=').unwrap_or((&option, ""));
        let twice = match key {
            "cmdline" => command_line.replace(value.to_owned()).is_some(),
            "mem" => memory.replace(parse_memory(value)?).is_some(),
            "cpus" => cpus.replace(parse_cpus(value)?).is_some(),
            "hugepages" => pages.replace(parse_huge_pages(value)?).is_some(),
            _ => match PATHS.into_iter().zip(&mut paths).find(|(name, _)| *name == key) {
                Some((name, _)) if value.is_empty() => return Err(SpecError::Empty(name)),
                Some((_, path)) => path.replace(PathBuf::from(value)).is_some(),
                None => {
                    let known = "elf, mem, cpus and hugepages, or kernel, initrd, cmdline, console, log, mem, cpus and hugepages";
                    return Err(SpecError::Key { source_kind: "kvm", key: key.to_owned(), known });
                }
            },
        };
        if twice {
            return Err(SpecError::Twice(key.to_owned()));
        }
    }
    let [elf, kernel, initrd, console, log] = paths;
    let (guest, default) = match (elf, kernel) {
        (Some(elf), None) => {
            let of_linux = [
                ("initrd", initrd.is_some()),
                ("cmdline", command_line.is_some()),
                ("console", console.is_some()),
                ("log", log.is_some()),
            ];
            if let Some((key, _)) = of_linux.into_iter().find(|(_, given)| *given) {
                return Err(SpecError::WithoutKernel(key));
            }
            (KvmGuest::Elf(elf), MEMORY_DEFAULT)
        }
        (None, Some(kernel)) => {
            let command_line = command_line.unwrap_or_else(|| linux::COMMAND_LINE.to_owned());
            let linux = LinuxSpec { kernel, initrd, command_line, console, log };
            (KvmGuest::Linux(linux), MEMORY_DEFAULT_LINUX)
        }
        _ => return Err(SpecError::NoGuest),
    };
    Ok(SourceSpec::Kvm {
        guest,
        memory: memory.unwrap_or(default),
        cpus: cpus.unwrap_or(1),
        pages: pages.unwrap_or_default(),
    })
}

/// Options between commas, where two commas stand for one that is part of a value.
fn split_options(options: &str) -> Vec<String> {
    let mut all = Vec::new();
    let mut option = String::new();
    let mut characters = options.chars().peekable();
    while let Some(character) = characters.next() {
        if character != ',' {
            option.push(character);
        } else if characters.next_if_eq(&',').is_some() {
            option.push(',');
        } else {
            all.push(std::mem::take(&mut option));
        }
    }
    if !options.is_empty() {
        all.push(option);
    }
    all
}

fn parse_file(kind: &'static str, file: Option<&str>) -> Result<PathBuf, SpecError> {
    file.filter(|file| !file.is_empty()).map(PathBuf::from).ok_or(SpecError::NoFile(kind))
}

fn parse_qemu(options: &str) -> Result<SourceSpec, SpecError> {
    let (mut qmp, mut pid) = (None, None);
    for option in options.split(',').filter(|_| !options.is_empty()) {
        let (key, value) = option.split_once('=').unwrap_or((option, ""));
        let twice = match key {
            "qmp" if value.is_empty() => return Err(SpecError::NoQmp),
            "qmp" => qmp.replace(PathBuf::from(value)).is_some(),
            "pid" => pid.replace(parse_pid(value)?).is_some(),
            _ => {
                let known = "qmp and pid";
                return Err(SpecError::Key { source_kind: "qemu", key: key.to_owned(), known });
            }
        };
        if twice {
            return Err(SpecError::Twice(key.to_owned()));
        }
    }
    Ok(SourceSpec::Qemu { qmp: qmp.ok_or(SpecError::NoQmp)?, pid })
}

fn parse_pid(value: &str) -> Result<u32, SpecError> {
    decimal(value)
        .and_then(|n| u32::try_from(n).ok())
        .filter(|pid| (1..=i32::MAX.cast_unsigned()).contains(pid))
        .ok_or_else(|| SpecError::Value {
            key: "pid",
            value: value.to_owned(),
            expected: "use the number of QEMU's process",
        })
}

fn parse_memory(value: &str) -> Result<u64, SpecError> {
    let (digits, shift) = match value.as_bytes().last() {
        Some(b'K') => (value.trim_end_matches('K'), 10),
        Some(b'M') => (value.trim_end_matches('M'), 20),
        Some(b'G') => (value.trim_end_matches('G'), 30),
        _ => (value, 0),
    };
    decimal(digits)
        // Exactly one suffix: `64MM` must not pass for `64M`.
        .filter(|_| value.len() <= digits.len() + 1)
        .and_then(|n| n.checked_mul(1 << shift))
        .filter(|size| (MEMORY_MIN..=kvm::MEMORY_MAX).contains(size) && size % 4096 == 0)
        .ok_or_else(|| SpecError::Value {
            key: "mem",
            value: value.to_owned(),
            expected: "use bytes or a number with K, M or G, from 1M to 16G, in whole 4K pages",
        })
}

fn parse_huge_pages(value: &str) -> Result<HugePages, SpecError> {
    match value {
        "2M" => Ok(HugePages::Of2M),
        "1G" => Ok(HugePages::Of1G),
        _ => Err(SpecError::Value {
            key: "hugepages",
            value: value.to_owned(),
            expected: "use 2M or 1G for pages of the host's pool; without it memory is in transparent huge pages",
        }),
    }
}

fn parse_cpus(value: &str) -> Result<u32, SpecError> {
    decimal(value)
        .and_then(|n| u32::try_from(n).ok())
        .filter(|cpus| (1..=kvm::VCPUS_MAX).contains(cpus))
        .ok_or_else(|| SpecError::Value {
            key: "cpus",
            value: value.to_owned(),
            expected: "use a number from 1 to 16",
        })
}

/// Digits and nothing else: `str::parse` alone would take `+1`.
fn decimal(text: &str) -> Option<u64> {
    if text.bytes().all(|b| b.is_ascii_digit()) { text.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parse(text: &str) -> Result<MachineSpec, SpecError> {
        text.parse()
    }

    fn kvm(elf: &str, memory: u64, cpus: u32) -> SourceSpec {
        SourceSpec::Kvm { guest: KvmGuest::Elf(elf.into()), memory, cpus, pages: HugePages::Transparent }
    }

    fn linux(spec: LinuxSpec, memory: u64, cpus: u32) -> SourceSpec {
        SourceSpec::Kvm { guest: KvmGuest::Linux(spec), memory, cpus, pages: HugePages::Transparent }
    }

    #[test]
    fn accepts() {
        for (text, id, source) in [
            ("demo", "demo", SourceSpec::Demo { plain: false }),
            ("demo:plain", "demo", SourceSpec::Demo { plain: true }),
            ("a.b-c_1=demo", "a.b-c_1", SourceSpec::Demo { plain: false }),
            ("kvm:elf=k.elf", "kvm", kvm("k.elf", 64 << 20, 1)),
            ("kvm:cpus=16,mem=16G,elf=/a=b:c", "kvm", kvm("/a=b:c", 16 << 30, 16)),
            (
                "kvm:kernel=k",
                "kvm",
                linux(
                    LinuxSpec {
                        kernel: "k".into(),
                        initrd: None,
                        command_line: "console=ttyS0".into(),
                        console: None,
                        log: None,
                    },
                    512 << 20,
                    1,
                ),
            ),
            (
                "vm=kvm:cmdline=console=ttyS0,,115200 a,log=l,mem=1G,initrd=a,,b,console=c,cpus=2,kernel=k",
                "vm",
                linux(
                    LinuxSpec {
                        kernel: "k".into(),
                        initrd: Some("a,b".into()),
                        command_line: "console=ttyS0,115200 a".into(),
                        console: Some("c".into()),
                        log: Some("l".into()),
                    },
                    1 << 30,
                    2,
                ),
            ),
            ("dump:/a=b,c:d", "dump", SourceSpec::Dump("/a=b,c:d".into())),
            ("bug-7=image:i.toml", "bug-7", SourceSpec::Image("i.toml".into())),
            ("x=kvm:elf=f,mem=1024K", "x", kvm("f", 1 << 20, 1)),
            ("x=kvm:elf=f,mem=1052672", "x", kvm("f", (1 << 20) + 4096, 1)),
            ("qemu:qmp=/run/a.qmp", "qemu", SourceSpec::Qemu { qmp: "/run/a.qmp".into(), pid: None }),
            ("vm=qemu:pid=7,qmp=s=t", "vm", SourceSpec::Qemu { qmp: "s=t".into(), pid: Some(7) }),
        ] {
            assert_eq!(parse(text).unwrap(), MachineSpec { id: id.into(), source, symbols: None }, "{text}");
        }
    }

    #[test]
    fn every_source_takes_symbols() {
        for (with, without, file) in [
            ("demo:symbols=/a/System.map", "demo", "/a/System.map"),
            ("demo:plain,symbols=k", "demo:plain", "k"),
            ("demo,symbols=a:b", "demo", "a:b"),
            ("x=demo,plain,symbols=k", "x=demo:plain", "k"),
            ("x=kvm:elf=f,symbols=s=t:u,mem=2M", "x=kvm:elf=f,mem=2M", "s=t:u"),
            ("kvm:symbols=v,elf=f", "kvm:elf=f", "v"),
            (
                "kvm:kernel=k,cmdline=a,,symbols=b,symbols=v,cpus=2",
                "kvm:kernel=k,cmdline=a,,symbols=b,cpus=2",
                "v",
            ),
            ("kvm:kernel=k,symbols=v,cmdline=a,,symbols=b", "kvm:kernel=k,cmdline=a,,symbols=b", "v"),
            ("qemu:qmp=s,symbols=v", "qemu:qmp=s", "v"),
            ("dump:/a=b,c:d,symbols=v", "dump:/a=b,c:d", "v"),
            ("image:i.toml,symbols=v", "image:i.toml", "v"),
        ] {
            let symbols = Some(file.into());
            assert_eq!(parse(with).unwrap(), MachineSpec { symbols, ..parse(without).unwrap() }, "{with}");
        }
        assert_eq!(parse("demo:symbols=").unwrap_err(), SpecError::NoSymbols);
        assert_eq!(parse("qemu:qmp=s,symbols=,pid=1").unwrap_err(), SpecError::NoSymbols);
        assert_eq!(parse("dump:symbols=v").unwrap_err(), SpecError::NoFile("dump"));
        for text in ["qemu:symbols=a,symbols=b,qmp=s", "dump:f,symbols=a,symbols=b"] {
            assert_eq!(parse(text).unwrap_err(), SpecError::Twice("symbols".to_owned()));
        }
    }

    #[test]
    fn refuses() {
        type Check = fn(&SpecError) -> bool;
        let source: Check = |e| matches!(e, SpecError::Source(_));
        let id: Check = |e| matches!(e, SpecError::Id(_));
        let key: Check = |e| matches!(e, SpecError::Key { .. });
        let value: Check = |e| matches!(e, SpecError::Value { .. });
        let no_guest: Check = |e| matches!(e, SpecError::NoGuest);
        let empty: Check = |e| matches!(e, SpecError::Empty(_));
        let without_kernel: Check = |e| matches!(e, SpecError::WithoutKernel(_));
        let no_file: Check = |e| matches!(e, SpecError::NoFile(_));
        let no_qmp: Check = |e| matches!(e, SpecError::NoQmp);
        let twice: Check = |e| matches!(e, SpecError::Twice(_));
        for (text, check) in [
            ("", source),
            ("demo ", source),
            ("qemux", source),
            ("qemu", no_qmp),
            ("qemu:", no_qmp),
            ("qemu:qmp=", no_qmp),
            ("qemu:pid=7", no_qmp),
            ("qemu:qmp=s,pid=0", value),
            ("qemu:qmp=s,pid=-1", value),
            ("qemu:qmp=s,pid=4294967297", value),
            ("qemu:qmp=s,qmp=t", twice),
            ("qemu:qmp=s,hmp=t", key),
            ("elf=f", source),
            ("=demo", id),
            ("-x=demo", id),
            ("a b=demo", id),
            ("demo:fast", key),
            ("demo:", key),
            ("kvm:elf=f,ram=64M", key),
            ("kvm:elf=f,", key),
            ("kvm:elf=f,mem=64M,mem=64M", twice),
            ("kvm", no_guest),
            ("kvm:", no_guest),
            ("kvm:mem=64M", no_guest),
            ("kvm:initrd=f", no_guest),
            ("kvm:elf=f,kernel=k", no_guest),
            ("kvm:elf=", empty),
            ("kvm:kernel=", empty),
            ("kvm:kernel=k,console", empty),
            ("kvm:elf=f,cmdline=", without_kernel),
            ("kvm:initrd=i,elf=f", without_kernel),
            ("kvm:kernel=k,disk=d", key),
            ("kvm:kernel=k,kernel=k", twice),
            ("kvm:kernel=k,cmdline=,cmdline=", twice),
            ("kvm:kernel=k,cmdline=a,b", key),
            ("dump", no_file),
            ("dump:", no_file),
            ("x=image:", no_file),
            ("kvm:elf=f,mem=", value),
            ("kvm:elf=f,mem=M", value),
            ("kvm:elf=f,mem=64MM", value),
            ("kvm:elf=f,mem=64m", value),
            ("kvm:elf=f,mem=+64M", value),
            ("kvm:elf=f,mem=-1", value),
            ("kvm:elf=f,mem=1023K", value),
            ("kvm:elf=f,mem=17G", value),
            ("kvm:elf=f,mem=1048577", value),
            ("kvm:elf=f,mem=18446744073709551615G", value),
            ("kvm:elf=f,mem=18446744073709551616", value),
            ("kvm:elf=f,hugepages=4K", value),
            ("kvm:elf=f,hugepages=2M,hugepages=2M", twice),
            ("kvm:elf=f,cpus=0", value),
            ("kvm:elf=f,cpus=17", value),
            ("kvm:elf=f,cpus=1x", value),
        ] {
            let error = parse(text).unwrap_err();
            assert!(check(&error), "{text:?}: {error:?}");
        }
        assert!(parse(&format!("{}=demo", "x".repeat(64))).is_ok());
        assert!(id(&parse(&format!("{}=demo", "x".repeat(65))).unwrap_err()));
        let message = parse("kvm:elf=f,ram=1M").unwrap_err().to_string();
        assert!(
            message.contains("ram") && message.contains("elf, mem, cpus and hugepages, or kernel"),
            "{message}"
        );
    }
}
