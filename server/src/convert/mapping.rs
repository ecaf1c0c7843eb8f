//! Ranges, filters and budgets of maps, and the extents that come of them.

use pagewalk::map::{Budget, Extent, Filter, Limit, Map, PageSizes, Progress, RangeError, Tally};
use pagewalk::{Gpa, Gva, PageFormat, PageSize, Rights, Walker};
use pagewalk_proto::v1;
use pagewalk_proto::v1::extent::Outcome;

use super::address::number;
use super::fault::fault;
use super::translation::translation;
use crate::machine::PAGE;
use crate::status::Error;

/// A map of the addresses that a request names.
pub(crate) fn over(walker: Walker, range: Option<v1::GvaRange>) -> Result<Map, Error> {
    let range = range.unwrap_or_default();
    let map = Map::new(walker);
    let (start, end) = (bound(range.start, "range.start")?, bound(range.end, "range.end")?);
    let format = map.walker().gva_walk().format();
    let last = match end {
        None if format.mode().is_long() => u64::MAX,
        None => u64::from(u32::MAX),
        Some(0) => {
            return Err(Error::invalid("range.end", "0 is before every address: leave it out for no end"));
        }
        Some(end) => end - 1,
    };
    let first = start.unwrap_or(0);
    let mode = format.mode();
    map.over(Gva(first), Gva(last)).map_err(|error| match error {
        RangeError::Inverted => Error::invalid(
            "range",
            format!("its end, {:#x}, is not above its start, {first:#x}", last.wrapping_add(1)),
        ),
        RangeError::NotAnAddress(gva) if gva.0 == first => {
            Error::invalid("range.start", format!("{first:#x} is no linear address of {mode} paging"))
        }
        RangeError::NotAnAddress(gva) => Error::invalid(
            "range.end",
            format!("{gva}, right before it, is no linear address of {mode} paging"),
        ),
    })
}

fn bound(address: Option<v1::Address>, field: &'static str) -> Result<Option<u64>, Error> {
    let Some(address) = address else { return Ok(None) };
    let address = number(Some(address), field)?;
    if !address.is_multiple_of(PAGE) {
        return Err(Error::invalid(field, format!("{address:#x} is not aligned to 4 KiB (0x1000)")));
    }
    Ok(Some(address))
}

pub(crate) fn filter(filter: Option<v1::MappingFilter>) -> Result<Filter, Error> {
    let filter = filter.unwrap_or_default();
    let mut wanted = Filter::ALL;
    for (choice, right) in
        [(filter.write, Rights::WRITE), (filter.execute, Rights::EXECUTE), (filter.user, Rights::USER)]
    {
        match choice {
            Some(true) => wanted.required = wanted.required.or(right),
            Some(false) => wanted.forbidden = wanted.forbidden.or(right),
            None => {}
        }
    }
    if !filter.page_sizes.is_empty() {
        wanted.page_sizes = PageSizes::NONE;
    }
    for size in filter.page_sizes {
        let size = match v1::PageSize::try_from(size) {
            Ok(v1::PageSize::PageSize4k) => PageSize::Size4K,
            Ok(v1::PageSize::PageSize2m) => PageSize::Size2M,
            Ok(v1::PageSize::PageSize4m) => PageSize::Size4M,
            Ok(v1::PageSize::PageSize1g) => PageSize::Size1G,
            Ok(v1::PageSize::Unpaged) => PageSize::Unpaged,
            Ok(v1::PageSize::Unspecified) | Err(_) => {
                return Err(Error::invalid("filter.page_sizes", format!("{size} is no page size")));
            }
        };
        wanted.page_sizes = wanted.page_sizes.with(size);
    }
    Ok(wanted)
}

pub(crate) fn budget(budget: Option<v1::MappingBudget>) -> Result<Budget, Error> {
    let budget = budget.unwrap_or_default();
    let within = |asked: Option<u64>, most: u64, field| match asked {
        None => Ok(most),
        Some(asked) if (1..=most).contains(&asked) => Ok(asked),
        Some(asked) => {
            Err(Error::invalid(field, format!("{asked} is not between 1 and {most}, the default")))
        }
    };
    let most = Budget::DEFAULT;
    Ok(Budget {
        entries: within(budget.entries, most.entries, "budget.entries")?,
        extents: within(budget.extents, most.extents, "budget.extents")?,
    })
}

/// The first and the last byte of memory that is looked for.
pub(crate) fn gpas(gpa: Option<v1::Address>, bytes: Option<u64>) -> Result<(Gpa, Gpa), Error> {
    let first = number(gpa, "gpa")?;
    let last = bytes.unwrap_or(1).checked_sub(1).and_then(|above| first.checked_add(above));
    match last {
        Some(last) => Ok((Gpa(first), Gpa(last))),
        None => Err(Error::invalid("bytes", "from 1, and no further than 2^64")),
    }
}

pub(crate) fn extent(extent: &Extent, format: &PageFormat) -> v1::Extent {
    v1::Extent {
        start: extent.start.0,
        bytes: extent.bytes,
        outcome: Some(match &extent.outcome {
            Ok(page) => Outcome::Translation(translation(page, format)),
            Err(refused) => Outcome::Fault(fault(refused)),
        }),
    }
}

pub(crate) fn tally(tally: &Tally) -> v1::MappingTally {
    v1::MappingTally {
        tables: tally.tables,
        entries: tally.entries,
        extents: tally.extents,
        mapped_bytes: tally.mapped,
        unbacked_tables: tally.unbacked,
        reserved_entries: tally.reserved,
        nested_refusals: tally.nested,
    }
}

pub(crate) fn truncation(progress: Progress) -> Option<v1::Truncation> {
    let Progress::Truncated { at, limit } = progress else { return None };
    let limit = match limit {
        Limit::Entries => v1::MappingLimit::Entries,
        Limit::Extents => v1::MappingLimit::Extents,
    };
    // Ranges begin with a page; a search stops within one only right before the memory that it looks for.
    Some(v1::Truncation { limit: limit.into(), continue_at: at.0 & !(PAGE - 1) })
}
