//! Rights, backing, page sizes and memory types.

use pagewalk::{Backing, EptMemoryType, MemoryType, PageSize, Rights};
use pagewalk_proto::v1;

pub(crate) fn rights(rights: Rights) -> v1::Rights {
    v1::Rights { read: rights.read(), write: rights.write(), user: rights.user(), execute: rights.execute() }
}

pub(crate) fn backing(backing: Backing) -> v1::Backing {
    match backing {
        Backing::Ram => v1::Backing::Ram,
        Backing::ReadOnly => v1::Backing::ReadOnly,
        Backing::None => v1::Backing::None,
    }
}

pub(crate) fn page_size(size: PageSize) -> v1::PageSize {
    match size {
        PageSize::Unpaged => v1::PageSize::Unpaged,
        PageSize::Size4K => v1::PageSize::PageSize4k,
        PageSize::Size2M => v1::PageSize::PageSize2m,
        PageSize::Size4M => v1::PageSize::PageSize4m,
        PageSize::Size1G => v1::PageSize::PageSize1g,
    }
}

pub(crate) fn memory_type(memory_type: MemoryType) -> v1::MemoryType {
    match memory_type {
        MemoryType::Uncacheable => v1::MemoryType::Uc,
        MemoryType::WriteCombining => v1::MemoryType::Wc,
        MemoryType::WriteThrough => v1::MemoryType::Wt,
        MemoryType::WriteProtected => v1::MemoryType::Wp,
        MemoryType::WriteBack => v1::MemoryType::Wb,
        MemoryType::UncacheableMinus => v1::MemoryType::UcMinus,
    }
}

pub(crate) fn ept_type(said: EptMemoryType) -> v1::EptMemoryType {
    v1::EptMemoryType { memory_type: memory_type(said.memory_type).into(), ignore_pat: said.ignore_pat }
}
