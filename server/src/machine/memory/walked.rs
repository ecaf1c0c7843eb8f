//! Memory as the walker reads it.
//!
//! The largest window is looked into first, in line; the others, and what has to be fetched, are looked for out of line.

use std::sync::atomic::{AtomicU64, Ordering};

use pagewalk::{Backing, ExchangeError, Gpa, Memory};

use super::{GuestRam, PAGE, Region, Window};

impl GuestRam {
    #[cold]
    fn load_rest(&self, gpa: Gpa) -> Option<u64> {
        if let Some(word) = self.rest.iter().find_map(|w| w.word(gpa)) {
            return Some(u64::from_le(word.load(Ordering::Relaxed)));
        }
        // Stretches are whole pages, so that an aligned word lies in one.
        let (from, offset, _) = self.other_at(gpa).filter(|_| gpa.0.is_multiple_of(8))?;
        let mut word = [0; 8];
        from.fetch(offset, &mut word).ok()?;
        Some(u64::from_le_bytes(word))
    }

    /// A table by one fetch: the guest may change it meanwhile, but no entry is half of one value and half of another unless the
    /// host copies less than a word at a time.
    #[cold]
    fn fetch_table(&self, table: Gpa, entries: &mut [u64; 512]) -> bool {
        let mut bytes = [0; PAGE as usize];
        let Some((from, offset, _)) = self.other_at(Gpa(table.0 & !(PAGE - 1))) else { return false };
        if from.fetch(offset, &mut bytes).is_err() {
            return false;
        }
        let (words, _) = bytes.as_chunks::<8>();
        for (entry, word) in entries.iter_mut().zip(words) {
            *entry = u64::from_le_bytes(*word);
        }
        true
    }
}

impl Memory for GuestRam {
    #[inline]
    fn load_u64(&self, gpa: Gpa) -> Option<u64> {
        match self.first.word(gpa) {
            Some(word) => Some(u64::from_le(word.load(Ordering::Relaxed))),
            None => self.load_rest(gpa),
        }
    }

    #[inline(always)]
    fn load_in_table(&self, table: Gpa, offset: u64) -> Option<u64> {
        match self.first.load_in_table(table.0, offset) {
            Some(word) => Some(word),
            None => self.load_rest(Gpa(table.0 & !(PAGE - 1) | offset & (PAGE - 8))),
        }
    }

    #[inline]
    fn ram(&self) -> (Gpa, u64) {
        let Window { start, words, read_only, .. } = self.first;
        (Gpa(start), if read_only { 0 } else { words * 8 })
    }

    #[inline]
    fn words(&self) -> &[AtomicU64] {
        if self.first.read_only { &[] } else { self.first.all() }
    }

    #[inline]
    fn prefetch(&self, gpa: Gpa) {
        if let Some(window) = self.window(gpa) {
            window.prefetch(gpa);
        }
    }

    #[inline]
    fn table(&self, table: Gpa) -> Option<&[AtomicU64; 512]> {
        self.window(table)?.table(table)
    }

    #[inline]
    fn load_table(&self, table: Gpa, entries: &mut [u64; 512]) -> bool {
        match self.table(table) {
            Some(words) => {
                for (entry, word) in entries.iter_mut().zip(words) {
                    *entry = u64::from_le(word.load(Ordering::Relaxed));
                }
                true
            }
            None => self.fetch_table(table, entries),
        }
    }

    fn compare_exchange_u64(&self, gpa: Gpa, current: u64, new: u64) -> Result<(), ExchangeError> {
        let window = self.window(gpa).ok_or(ExchangeError::Unbacked)?;
        // Memory of others is mapped without the right to write.
        if window.read_only || !self.is_ours() {
            return Err(ExchangeError::ReadOnly);
        }
        let word = window.word(gpa).ok_or(ExchangeError::Unbacked)?;
        word.compare_exchange(current.to_le(), new.to_le(), Ordering::AcqRel, Ordering::Relaxed)
            .map(drop)
            .map_err(|found| ExchangeError::Changed(u64::from_le(found)))
    }

    #[inline]
    fn backing(&self, gpa: Gpa) -> Backing {
        let read_only = self.window(gpa).map(|window| window.read_only).or_else(|| {
            self.others.iter().find(|stretch| stretch.find(gpa).is_some()).map(|stretch| stretch.read_only)
        });
        match read_only {
            None => Backing::None,
            Some(true) => Backing::ReadOnly,
            Some(false) => Backing::Ram,
        }
    }

    fn backing_run(&self, gpa: Gpa) -> (Backing, u64) {
        let above = |region: &Region| region.start.0.checked_sub(gpa.0).filter(|bytes| *bytes > 0);
        let within =
            |region: &Region| gpa.0.checked_sub(region.start.0).filter(|offset| *offset < region.size);
        let left = self.regions.iter().find_map(|region| Some(region.size - within(region)?));
        let gap = || self.regions.iter().filter_map(above).min().unwrap_or(u64::MAX - gpa.0);
        (self.backing(gpa), left.unwrap_or_else(gap))
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    pub(in super::super) fn two_regions() -> GuestRam {
        GuestRam::allocate(&[
            Region { start: Gpa(0x1000), size: 0x2000, read_only: false },
            Region { start: Gpa(0x10_0000), size: 0x1000, read_only: true },
        ])
        .unwrap()
    }

    /// However many regions there are, whichever is the largest, and wherever one looks.
    #[test]
    fn every_way_to_load_finds_the_same() {
        let region =
            |start, pages| Region { start: Gpa(start), size: pages * PAGE, read_only: start == 0x9000 };
        let sets: [&[Region]; 4] = [
            &[region(0, 4)],
            &[region(0x1000, 1), region(0x4000, 3)],
            &[region(0x2000, 3), region(0x5000, 1), region(0x9000, 5)],
            &[region(0x1000, 2), region(0x8000, 1), region(0x9000, 1), region(0xb000, 2)],
        ];
        for regions in sets {
            let ram = GuestRam::allocate(regions).unwrap();
            for at in (0..0x1_0000).step_by(8).map(Gpa) {
                let inside = regions.iter().find(|r| at.0.wrapping_sub(r.start.0) < r.size);
                if inside.is_some() {
                    ram.write_u64(at, at.0 | 1).unwrap();
                }
                let expected = inside.map(|_| at.0 | 1);
                let (table, offset) = (Gpa(at.0 & !0xfff), at.0 & 0xfff);
                ram.prefetch(at);
                assert_eq!(ram.load_u64(at), expected, "{at}");
                assert_eq!(ram.load_in_table(table, offset), expected, "{at}");
                assert_eq!(ram.load_in_table(Gpa(table.0 | 0xff8), offset | !0xfff), expected, "{at}");
                let (first, size) = ram.ram();
                if at.0.wrapping_sub(first.0) < size {
                    assert_eq!(ram.backing(at), Backing::Ram, "{at}");
                    let word = &ram.words()[(at.0 - first.0) as usize / 8];
                    assert_eq!(Some(word.load(Ordering::Relaxed)), expected, "{at}");
                }
                assert_eq!(ram.words().len() as u64 * 8, size);
            }
            for outside in [1 << 51, 1 << 63, !0xfff] {
                ram.prefetch(Gpa(outside));
                assert_eq!(ram.load_in_table(Gpa(outside), 8), None);
            }
        }
    }

    #[test]
    fn loads_inside_and_nowhere_else() {
        let ram = two_regions();
        ram.write_u64(Gpa(0x1000), 11).unwrap();
        ram.write_u64(Gpa(0x2ff8), 12).unwrap();
        ram.write_u64(Gpa(0x10_0ff8), 13).unwrap();
        assert_eq!(ram.load_u64(Gpa(0x1000)), Some(11));
        assert_eq!(ram.load_u64(Gpa(0x2ff8)), Some(12));
        assert_eq!(ram.load_u64(Gpa(0x10_0ff8)), Some(13));
        for outside in [0, 0xff8, 0x3000, 0xf_fff8, 0x10_1000, u64::MAX, u64::MAX - 7, 1 << 63] {
            assert_eq!(ram.load_u64(Gpa(outside)), None, "{outside:#x}");
            assert_eq!(ram.backing(Gpa(outside)), Backing::None, "{outside:#x}");
        }
        for unaligned in 0x1001..0x1008 {
            assert_eq!(ram.load_u64(Gpa(unaligned)), None, "{unaligned:#x}");
        }
    }

    #[test]
    fn backing_is_by_byte() {
        let ram = two_regions();
        assert_eq!(ram.backing(Gpa(0x2fff)), Backing::Ram);
        assert_eq!(ram.backing(Gpa(0x3000)), Backing::None);
        assert_eq!(ram.backing(Gpa(0x10_0fff)), Backing::ReadOnly);
    }

    #[test]
    fn runs_of_backing_end_with_their_regions() {
        let ram = two_regions();
        for (gpa, run) in [
            (0, (Backing::None, 0x1000)),
            (0xfff, (Backing::None, 1)),
            (0x1000, (Backing::Ram, 0x2000)),
            (0x2fff, (Backing::Ram, 1)),
            (0x3000, (Backing::None, 0xf_d000)),
            (0x10_0800, (Backing::ReadOnly, 0x800)),
            (0x10_1000, (Backing::None, u64::MAX - 0x10_1000)),
        ] {
            assert_eq!(ram.backing_run(Gpa(gpa)), run, "{gpa:#x}");
        }
    }

    #[test]
    fn loads_a_table_whole_or_not_at_all() {
        let ram = two_regions();
        let mut entries = [1; 512];
        ram.write_u64(Gpa(0x2000), 7).unwrap();
        ram.write_u64(Gpa(0x2ff8), 8).unwrap();
        assert!(ram.load_table(Gpa(0x2fff), &mut entries));
        assert_eq!((entries[0], entries[1], entries[511]), (7, 0, 8));
        assert!(ram.load_table(Gpa(0x10_0000), &mut entries));
        for outside in [0, 0x3000, 0xf_f000, u64::MAX] {
            assert!(!ram.load_table(Gpa(outside), &mut entries), "{outside:#x}");
        }
    }

    #[test]
    fn exchanges_only_what_it_expected_and_never_in_a_rom() {
        let ram = two_regions();
        assert_eq!(ram.compare_exchange_u64(Gpa(0x1008), 0, 5), Ok(()));
        assert_eq!(ram.compare_exchange_u64(Gpa(0x1008), 0, 6), Err(ExchangeError::Changed(5)));
        assert_eq!(ram.compare_exchange_u64(Gpa(0x10_0000), 0, 6), Err(ExchangeError::ReadOnly));
        assert_eq!(ram.compare_exchange_u64(Gpa(0x3000), 0, 6), Err(ExchangeError::Unbacked));
        assert_eq!(ram.load_u64(Gpa(0x1008)), Some(5));
    }
}
