//! Batches, put before the single walk.

use crate::{BATCH, Mutant};

const fn mutant(
    slip: &'static str,
    changes: &'static [(&'static str, &'static str, &'static str)],
) -> Mutant {
    Mutant { slip, judges: BATCH, changes }
}

pub(crate) const MUTANTS: &[Mutant] = &[
    mutant(
        "a lane's rights are those of its PTE alone",
        &[(
            "batch/admission.rs",
            "(entry ^ GRANTING | state) & WITHHOLDING",
            "(entry ^ GRANTING | state & 0) & WITHHOLDING",
        )],
    ),
    mutant(
        "a lane minds no reserved bit of a table's entry",
        &[(
            "batch/admission.rs",
            "LongMode::PRESENT | format.page_size_bit() | format.reserved_table_at(level)",
            "LongMode::PRESENT | format.page_size_bit()",
        )],
    ),
    mutant(
        "a lane minds no reserved bit of a leaf",
        &[(
            "batch/admission.rs",
            "LongMode::PRESENT | decided | format.reserved_leaf_at(level)",
            "LongMode::PRESENT | decided",
        )],
    ),
    mutant(
        "a lane takes a large page's PAT bit for its size",
        &[("batch/admission.rs", " | entry >> 5 & LongMode::PAGE_SIZE;", ";")],
    ),
    mutant(
        "a lane that met a large page goes on to a PTE",
        &[("batch/pipeline.rs", "block.done |= 1 << lane;", "block.done |= 0;")],
    ),
    mutant(
        "a lane takes addresses between the canonical halves",
        &[(
            "batch/pipeline.rs",
            "block.alone = mask(gvas.iter().map(|gva| !self.is_plain(*gva)));",
            "block.alone = 0;",
        )],
    ),
    mutant(
        "a lane takes every frame for RAM",
        &[(
            "batch/ram.rs",
            "frame.wrapping_sub(self.first) | self.last.wrapping_sub(frame)",
            "(frame.wrapping_sub(self.first) | self.last.wrapping_sub(frame)) & 0",
        )],
    ),
    mutant(
        "what one address of a block shares, all share",
        &[("batch/column.rs", "differing | (address ^ first)", "differing & (address ^ first)")],
    ),
    mutant(
        "a nested page is writable where the second dimension alone lets it be",
        &[(
            "batch/word.rs",
            "(word >> SIZE & 7) << NESTED_SIZE",
            "(word >> SIZE & 7) << NESTED_SIZE | word & WRITE",
        )],
    ),
    mutant(
        "a nested lane executes where the second dimension does not",
        &[("batch/nested.rs", "| nested & (PageWord::FRAME | NO_EXECUTE)", "| nested & PageWord::FRAME")],
    ),
    mutant(
        "a nested lane walks any nGPA",
        &[(
            "batch/nested.rs",
            "refused = mask(ngpas.iter().map(|ngpa| ngpa >> self.width != 0));",
            "refused = 0;",
        )],
    ),
    mutant(
        "a nested lane takes every memory type of EPT",
        &[("batch/nested.rs", "if EPT { entry & 1 << 3 | (entry ^ entry >> 1) & 1 << 4 } else { 0 }", "0")],
    ),
    mutant(
        "a nested lane finds the guest's entries by reads",
        &[("batch/nested.rs", "Some([by(AccessKind::Write)?,", "Some([by(AccessKind::Read)?,")],
    ),
    mutant(
        "a nested lane has one more address bit of its page",
        &[(
            "batch/nested.rs",
            "*home & PageWord::FRAME | ngpa & 0xfff",
            "*home & PageWord::FRAME | ngpa & 0x1fff",
        )],
    ),
    mutant(
        "a batch walks other addresses through the table it knows",
        &[("batch/pipeline.rs", "&& elsewhere >> Self::shift(2) == 0 ", "")],
    ),
    mutant(
        "a batch knows a table that the guest has taken out",
        &[("batch/pipeline.rs", "\n                    && known.path.holds(&self.ram)", "")],
    ),
    mutant(
        "a batch takes RAM for granted behind a table it knows",
        &[("batch/pipeline.rs", " && outside >> 63 == 0", "")],
    ),
    mutant(
        "what the levels above a known table withhold is forgotten",
        &[("batch/admission.rs", "let open = !state & WITHHOLDING;", "let open = WITHHOLDING;")],
    ),
    mutant(
        "a known table grants what no entry of it can have",
        &[(
            "batch/admission.rs",
            "!self.never && differing & self.refused == 0",
            "differing & self.refused == 0",
        )],
    ),
    mutant(
        "words are gathered by their place in all memory",
        &[("batch/ram.rs", "(state & ADDRESS).wrapping_sub(self.first) >> 3", "(state & ADDRESS) >> 3")],
    ),
    mutant(
        "a lane of 32-bit paging always takes the first entry of a word",
        &[("batch/pipeline.rs", "word >> ((gva >> Self::shift(level) & 1) << 5)", "word")],
    ),
    mutant(
        "a lane of PAE paging looks for rights in a PDPTE",
        &[("batch/pipeline.rs", "tables.through(0, pdpte | RIGHTS, 0)", "tables.through(0, pdpte, 0)")],
    ),
    mutant(
        "a lane takes pages of 4 MiB for smaller ones",
        &[("batch/admission.rs", "2 if self.short => (0x3f_ffff,", "2 if self.short => (0x1f_ffff,")],
    ),
    mutant(
        "a lane finds large pages where CR4.PSE is clear",
        &[(
            "batch/admission.rs",
            "LongMode::PRESENT | format.page_size_bit()",
            "LongMode::PRESENT | LongMode::PAGE_SIZE",
        )],
    ),
];
