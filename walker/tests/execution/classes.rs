//! Classes of outcomes, and how many cases each must have.

use pagewalk::{Backing, Fault, PageSize, PagingMode, Reason, Translation};

use super::Decides;
use super::expected::Expected;
use crate::bed::ground::{Act, Outcome, Play};
use crate::bed::judge::{Judge, full};

type Minimum = (&'static str, Option<u64>, u64);

/// Every outcome that the rules can produce has to have been seen often enough. Counts are for 200,000 cases.
pub(crate) fn minima(decides: Decides, mode: PagingMode, gib_pages: bool) -> Vec<Minimum> {
    let levels = match mode {
        PagingMode::None => 0,
        PagingMode::TwoLevel => 2,
        PagingMode::Pae => 3,
        PagingMode::FourLevel => 4,
        PagingMode::FiveLevel => 5,
    };
    let mut minima = Vec::new();
    for act in [Act::Load, Act::Store, Act::Fetch] {
        minima.extend([(mapped_by(act), Some(0), 2_000), (mapped_by(act), Some(3), 2_000)]);
    }
    if !full() {
        for act in [Act::StackLoad, Act::StackStore, Act::DescriptorLoad, Act::DescriptorTouch] {
            minima.extend([(mapped_by(act), Some(0), 100), (mapped_by(act), Some(3), 100)]);
        }
        minima.push(("mapped without backing", None, 500));
    }
    if mode == PagingMode::None {
        minima.push(("mapped unpaged", None, 100_000));
        return minima;
    }
    minima.extend([
        ("mapped 4 KiB", None, 20_000),
        (if mode == PagingMode::TwoLevel { "mapped 4 MiB" } else { "mapped 2 MiB" }, None, 8_000),
        ("accessed bit set", None, 20_000),
        ("dirty bit set", None, 5_000),
        ("refused: SMEP", None, 500),
        ("refused: SMAP", None, 500),
    ]);
    if mode.is_long() && gib_pages {
        minima.push(("mapped 1 GiB", None, 5_000));
    }
    let mut codes = vec![0, 1, 2, 3, 4, 5, 6, 7, 0x10, 0x11, 0x14, 0x15];
    match (decides, mode) {
        (Decides::Emulator, _) => codes.extend([8, 0xa, 0xc, 0xe, 0x18, 0x1c, 0x21, 0x23, 0x25, 0x27]),
        // A large page's reserved bits alone, and fetches under SMEP alone.
        (_, PagingMode::TwoLevel) => codes.extend([9, 0xb, 0xd, 0xf]),
        _ => codes.extend([9, 0xb, 0xd, 0xf, 0x19, 0x1d]),
    }
    minima.extend(codes.into_iter().map(|code| ("#PF, error code", Some(code), 100)));
    for level in 1..=levels {
        let leaf_alone = mode == PagingMode::TwoLevel && level == 1;
        minima.push(("refused: not present, level", Some(level), 500));
        // A PDPTE register grants everything, and holds no reserved bits.
        if mode == PagingMode::Pae && level == 3 {
            continue;
        }
        if !leaf_alone {
            minima.push(("refused: reserved, level", Some(level), 500));
        }
        minima.push(("refused: supervisor page, level", Some(level), 100));
        minima.push(("refused: read-only, level", Some(level), 100));
        if mode != PagingMode::TwoLevel {
            minima.push(("refused: no execute, level", Some(level), 100));
        }
    }
    if !full() {
        let tables = if mode == PagingMode::Pae { 1..levels - 1 } else { 1..levels };
        minima.extend(tables.map(|level| ("refused: table outside memory, level", Some(level), 150)));
    }
    if mode.is_long() && !full() {
        minima.extend([("#GP", None, 500), ("#SS", None, 100)]);
    }
    if decides == Decides::Emulator {
        minima.extend([
            ("refused: protection key", None, 2_000),
            ("allowed by a key that withholds", None, 2_000),
        ]);
    }
    minima
}

pub(crate) fn classify(
    judge: &mut Judge,
    answer: &Result<Translation, Fault>,
    expected: &Expected,
    play: &Play,
) {
    match answer {
        Ok(page) => {
            judge.count(mapped_by(play.act), u64::from(play.cpl));
            judge.count(
                match page.page_size() {
                    PageSize::Size4K => "mapped 4 KiB",
                    PageSize::Unpaged => "mapped unpaged",
                    PageSize::Size2M => "mapped 2 MiB",
                    PageSize::Size4M => "mapped 4 MiB",
                    PageSize::Size1G => "mapped 1 GiB",
                },
                0,
            );
            if page.backing() == Backing::None {
                judge.count("mapped without backing", 0);
                if expected.or == Some(Outcome::Done) {
                    judge.exempt("fetch without backing at CPL 3, #UD");
                } else if expected.or.is_some() {
                    judge.exempt("fetch without backing, under SMAP");
                } else if play.act == Act::Fetch {
                    judge.exempt("fetch without backing, KVM cannot emulate it");
                }
            }
        }
        Err(fault) => {
            let level = u64::from(fault.level);
            match fault.reason {
                Reason::NotPresent => judge.count("refused: not present, level", level),
                Reason::ReservedBits => judge.count("refused: reserved, level", level),
                Reason::SupervisorPage => judge.count("refused: supervisor page, level", level),
                Reason::NoExecute => judge.count("refused: no execute, level", level),
                Reason::ReadOnly => judge.count("refused: read-only, level", level),
                Reason::Smep => judge.count("refused: SMEP", 0),
                Reason::Smap => judge.count("refused: SMAP", 0),
                Reason::ProtectionKey => judge.count("refused: protection key", 0),
                Reason::TableUnbacked => {
                    judge.count("refused: table outside memory, level", level);
                    judge.exempt("table outside memory, #PF with P clear");
                }
                Reason::NonCanonical => judge.count("refused: not canonical", 0),
                _ => judge.count("refused otherwise", 0),
            }
        }
    }
    match expected.outcome {
        Outcome::Exception { vector: 14, code, .. } => {
            if let Some(deviation) = expected.deviation {
                judge.exempt(deviation);
            }
            judge.count("#PF, error code", code);
            judge.count_if("#PF on a fetch without I/D", expected.fetch_unreported);
            judge.count_if("#PF on an implicit supervisor access", play.act.is_implicit());
        }
        Outcome::Exception { vector: 13, .. } => judge.count("#GP", 0),
        Outcome::Exception { vector: 12, .. } => {
            judge.count("#SS", 0);
            if expected.or.is_some() {
                judge.exempt("#SS expected, #GP accepted");
            }
        }
        _ => {}
    }
}

pub(crate) fn mapped_by(act: Act) -> &'static str {
    match act {
        Act::Load => "mapped: load, CPL",
        Act::Store => "mapped: store, CPL",
        Act::Fetch => "mapped: fetch, CPL",
        Act::StackLoad => "mapped: stack load, CPL",
        Act::StackStore => "mapped: stack store, CPL",
        Act::DescriptorLoad => "mapped: descriptor read, CPL",
        Act::DescriptorTouch => "mapped: descriptor read and write, CPL",
        Act::ReadKeys => "no access",
    }
}
