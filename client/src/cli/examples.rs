//! Examples and exit codes behind each verb's help. The examples ask the demo machine of `pagewalkd demo`, and a test runs
//! every one of them against it.

macro_rules! examples {
    ($first:literal $(, $more:literal)*) => {
        concat!("Examples, with the demo machine:\n  ", $first $(, "\n  ", $more)*)
    };
}

macro_rules! exit_codes {
    ($($special:literal)?) => {
        concat!(
            "\n\nExit codes:\n  0  answered\n",
            $($special,)?
            "  2  the command line is wrong\n  3  no answer: no connection, or the daemon refused"
        )
    };
}

pub(super) const PAGEWALK: &str = concat!(
    examples!(
        "pagewalk machines",
        "pagewalk translate 0xffff800000010000 --explain",
        "pagewalk --json walker"
    ),
    exit_codes!(
        "  1  `translate`, `batch`, `range`, `across`, `nested-gpa`: the access would fault; `maps`, `find`, `range`: the list is cut short; `find`: nothing leads there; `doctor`: a check failed\n"
    )
);

pub(super) const TRANSLATE: &str = concat!(
    examples!(
        "pagewalk translate 0xffff800000010000 --explain",
        "pagewalk translate 0xffff_8000_0001_1000 0xffff_8000_0020_0000 --access write",
        "pagewalk translate 0x401000 --as user --cr3 0x21000",
        "pagewalk translate 0xffffffff81000000 --cr3 0x1000 --ncr3 0x50000 --trace"
    ),
    "\n\nSeveral addresses give a line each; with --json an array.",
    exit_codes!("  1  answered, and for one address at least the access would fault\n")
);

pub(super) const BATCH: &str = concat!(
    examples!(
        "pagewalk batch 0xffff800000010000 0xffff800000011000",
        "pagewalk batch 0xffff_8000_0001_1000 0xffff_8000_0020_0000 --access write --max-faults 0"
    ),
    "\n\nAddresses from a file, and columns in and out:\n  pagewalk batch --file addresses.txt\n  \
     pagewalk batch --file - --raw < addresses.bin > words.bin\n\ntranslation.proto describes the words \
     (BatchTranslateResponse). More than 262144 addresses\ngo in several requests; with --json their answers are an array.",
    exit_codes!("  1  answered, and for one address at least the access would fault\n")
);

pub(super) const RANGE: &str = concat!(
    examples!(
        "pagewalk range 0xffff800000010000..0xffff800000011000 --access fetch --as supervisor",
        "pagewalk range 0x401000+0x1000 --as user --access write --cr3 0x21000"
    ),
    "\n\nEvery address of the range is in a line, with its page or with the fault that the access would meet. `maps --range` lists\n\
     what is mapped, whoever may use it.",
    exit_codes!(
        "  1  answered, and for one address at least the access would fault, or the budget is used up\n"
    )
);

pub(super) const WALKER: &str =
    concat!(examples!("pagewalk walker", "pagewalk walker --watch --updates 3"), exit_codes!());

pub(super) const NESTED: &str = concat!(
    examples!(
        "pagewalk nested npt --ncr3 0x50000 --l2-cr3 0x1000",
        "pagewalk nested ept --eptp 0x5001e --l2-cr3 0x1000",
        "pagewalk nested off"
    ),
    exit_codes!()
);

pub(super) const NESTED_GPA: &str = concat!(
    examples!(
        "pagewalk nested-gpa 0x11000 --ncr3 0x50000 --explain",
        "pagewalk nested-gpa 0x11000 --access write --eptp 0x5001e --trace"
    ),
    "\n\nWithout a second dimension an L2's addresses are its L1's, and the answer says so.",
    exit_codes!("  1  answered, and the access would fault\n")
);

pub(super) const MAPS: &str = concat!(
    examples!(
        "pagewalk maps",
        "pagewalk maps --range 0xffff800000010000..0xffff800000020000 --problems",
        "pagewalk maps --wx --kernel",
        "pagewalk maps --page-size 2M --cr3 0x21000",
        "pagewalk maps --cr3 0x1000 --ncr3 0x50000"
    ),
    "\n\nPages that continue each other are one line. A and D: any of them is accessed, or dirty.",
    exit_codes!("  1  listed in part: the budget is used up\n")
);

pub(super) const FIND: &str = concat!(
    examples!("pagewalk find 0x10123", "pagewalk find 0x10000 --bytes 0x3000 --executable"),
    exit_codes!("  1  nothing leads there, or the budget is used up\n")
);

pub(super) const SPACES: &str = concat!(
    examples!("pagewalk spaces"),
    "\n\nA vCPU is seen when it publishes its registers: what runs in between is not.",
    exit_codes!()
);

pub(super) const ACROSS: &str = concat!(
    examples!("pagewalk across 0x401000 0x20000 0x21000 --as user", "pagewalk across 0xffff800000010000"),
    exit_codes!("  1  answered, and the access would fault in every address space\n")
);

pub(super) const VCPUS: &str = concat!(examples!("pagewalk vcpus"), exit_codes!());

pub(super) const REGS: &str =
    concat!(examples!("pagewalk regs --sync", "pagewalk regs set r15=0x1000 r14=7"), exit_codes!());

pub(super) const PAUSE: &str = concat!(examples!("pagewalk pause"), exit_codes!());

pub(super) const RESUME: &str = concat!(examples!("pagewalk resume"), exit_codes!());

pub(super) const STEP: &str = concat!(examples!("pagewalk step"), exit_codes!());

pub(super) const MACHINES: &str =
    concat!(examples!("pagewalk machines", "pagewalk machines --machine demo"), exit_codes!());

pub(super) const READ: &str = concat!(
    examples!("pagewalk read 0xffff800000011000 64", "pagewalk read --physical 0x10000 16 --json"),
    exit_codes!("  1  answered, and not all bytes could be read\n")
);

pub(super) const WRITE: &str = concat!(
    examples!("pagewalk write 0xffff800000012000 0123456789abcdef"),
    exit_codes!("  1  answered, and nothing could be written\n")
);

pub(super) const ATTACH: &str = concat!(
    examples!("pagewalk attach other=demo:plain"),
    "\n\nSPEC is what `pagewalkd --machine` takes, such as vm=qemu:qmp=/run/vm.qmp; files and sockets are the daemon's.",
    exit_codes!()
);

pub(super) const DETACH: &str = concat!(examples!("pagewalk detach other --end-guest"), exit_codes!());

pub(super) const SAVE: &str = concat!(
    examples!("pagewalk save demo.toml"),
    "\n\nA guest that runs is paused meanwhile. Nothing is written over. `pagewalkd serve --machine image:FILE.toml` opens it.",
    exit_codes!()
);

pub(super) const EXPLAIN_FAULT: &str = concat!(
    examples!(
        "pagewalk explain-fault --error-code 0x7 --cr2 0x402000",
        "pagewalk explain-fault --error-code 9 --cr2 0xffff_8000_0040_0000",
        "pagewalk explain-fault --exit-qualification 0x1aa --guest-physical 0x13000 --eptp 0x5001e"
    ),
    exit_codes!()
);

pub(super) const DOCTOR: &str = concat!(
    examples!("pagewalk doctor"),
    "\n\nExit codes:\n  0  nothing failed\n  1  a check failed\n  2  the command line is wrong"
);
