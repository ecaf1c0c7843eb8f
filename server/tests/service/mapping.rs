//! `ListMappings`, `FindMappings` and `TranslateRange`.
#![allow(clippy::print_stdout, reason = "some report how long they took")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use pagewalk_proto::v1;
use pagewalk_proto::v1::extent::Outcome;
use pagewalk_proto::v1::mapping_service_client::MappingServiceClient;
use pagewalkd::machine::{GuestRam, Health, LocalSource, Machine, Region};
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Code, Request, Streaming};

use crate::bed::{
    Bed, SOON, access, config, connect, from_plain, nested_on, number, open, read, refusal, text,
};

fn mappings(bed: &Bed) -> MappingServiceClient<Channel> {
    MappingServiceClient::new(bed.channel.clone())
}

/// All parts, the last of which says so.
macro_rules! parts {
    ($stream:expr) => {{
        let mut stream = $stream.into_inner();
        let mut parts = Vec::new();
        while let Some(part) = timeout(SOON, stream.message()).await.expect("a part in time").unwrap() {
            from_plain(part.provenance.as_ref());
            assert!(part.extents.len() <= 2048);
            parts.push(part);
        }
        let last = parts.last().expect("a part").clone();
        assert!(last.last && parts.iter().filter(|part| part.last).count() == 1, "the last part says so");
        let extents: Vec<v1::Extent> = parts.into_iter().flat_map(|part| part.extents).collect();
        (extents, last)
    }};
}

async fn list(bed: &Bed, request: v1::ListMappingsRequest) -> (Vec<v1::Extent>, v1::ListMappingsResponse) {
    parts!(mappings(bed).list_mappings(request).await.unwrap())
}

async fn find(bed: &Bed, request: v1::FindMappingsRequest) -> (Vec<v1::Extent>, v1::FindMappingsResponse) {
    parts!(mappings(bed).find_mappings(request).await.unwrap())
}

fn range(start: u64, end: u64) -> Option<v1::GvaRange> {
    Some(v1::GvaRange { start: number(start), end: number(end) })
}

fn page(extent: &v1::Extent) -> &v1::Translation {
    match &extent.outcome {
        Some(Outcome::Translation(page)) => page,
        other => panic!("no page: {other:?}"),
    }
}

/// What `Translate` says of the first byte of an extent, without regard to rights, is what the extent says.
async fn agree(bed: &Bed, extents: &[v1::Extent], state: Option<&v1::WalkerOverride>) {
    for extent in extents {
        let request = v1::TranslateRequest {
            access: access(v1::AccessKind::Read, v1::Privilege::Exempt),
            r#override: state.cloned(),
            ..read(extent.start)
        };
        let single = bed.translate(request).await.unwrap();
        match (extent.outcome.as_ref().unwrap(), single.outcome.unwrap()) {
            (Outcome::Translation(page), v1::translate_response::Outcome::Translation(single)) => {
                let (accessed, dirty) = (page.accessed, page.dirty);
                assert_eq!(*page, v1::Translation { accessed, dirty, ..single });
            }
            (Outcome::Fault(fault), v1::translate_response::Outcome::Fault(single)) => {
                assert_eq!(*fault, single);
            }
            (extent, single) => panic!("{extent:?} {single:?}"),
        }
    }
}

#[tokio::test]
async fn lists_the_demo_machine() {
    let bed = Bed::plain().await;
    let (extents, last) = list(&bed, v1::ListMappingsRequest { problems: true, ..Default::default() }).await;
    agree(&bed, &extents, None).await;
    let text = bed.landmark("kernel-text");
    let kernel = extents.iter().find(|extent| extent.start == text).expect("kernel text");
    assert_eq!(page(kernel).gpa, 0x1_0000);
    assert!(page(kernel).effective.unwrap().execute && !page(kernel).effective.unwrap().write);
    for name in ["reserved-bit", "unbacked-table"] {
        let at = bed.landmark(name);
        let within = |extent: &&v1::Extent| at.wrapping_sub(extent.start) < extent.bytes;
        let problem = extents.iter().find(within).unwrap_or_else(|| panic!("{name} is in no extent"));
        assert!(matches!(problem.outcome, Some(Outcome::Fault(_))), "{name}");
    }
    let tally = last.tally.unwrap();
    assert_eq!(tally.extents, extents.len() as u64);
    assert_eq!((tally.unbacked_tables, tally.reserved_entries, tally.nested_refusals), (1, 1, 0));
    assert_eq!((last.truncation, last.position), (None, 0));
    let sum = |extents: &[v1::Extent]| -> u64 {
        extents
            .iter()
            .filter(|it| matches!(it.outcome, Some(Outcome::Translation(_))))
            .map(|it| it.bytes)
            .sum()
    };
    assert_eq!(tally.mapped_bytes, sum(&extents));

    // Without problems the pages alone, and the same of them.
    let (pages, _) = list(&bed, v1::ListMappingsRequest::default()).await;
    assert_eq!(sum(&pages), sum(&extents));
    assert_eq!(pages.len() + 2, extents.len());

    // Each filter leaves what it says.
    let filtered = async |filter| {
        list(&bed, v1::ListMappingsRequest { filter: Some(filter), ..Default::default() }).await.0
    };
    let mut some = 0;
    for (write, execute, user) in [
        (Some(true), None, None),
        (None, Some(true), None),
        (None, None, Some(true)),
        (Some(true), Some(true), None),
        (Some(false), None, Some(false)),
    ] {
        let found = filtered(v1::MappingFilter { write, execute, user, page_sizes: vec![] }).await;
        let wanted: Vec<_> = pages
            .iter()
            .filter(|extent| {
                let rights = page(extent).effective.unwrap();
                write.is_none_or(|write| write == rights.write)
                    && execute.is_none_or(|execute| execute == rights.execute)
                    && user.is_none_or(|user| user == rights.user)
            })
            .cloned()
            .collect();
        some += found.len();
        assert_eq!(found, wanted);
    }
    assert!(some > 5);
    let large = filtered(v1::MappingFilter {
        page_sizes: vec![v1::PageSize::PageSize2m.into()],
        ..Default::default()
    })
    .await;
    assert_eq!(large.len(), 1);
    bed.stop().await;
}

#[tokio::test]
async fn lists_through_both_dimensions_and_with_a_walker_of_ones_own() {
    let bed = Bed::plain().await;
    let state = v1::WalkerOverride { cr3: Some(0x2_1000), ..Default::default() };
    let (own, _) =
        list(&bed, v1::ListMappingsRequest { r#override: Some(state.clone()), ..Default::default() }).await;
    agree(&bed, &own, Some(&state)).await;
    assert!(!own.is_empty());
    bed.walker().set_nested_mode(nested_on()).await.unwrap();
    let (extents, last) = list(&bed, v1::ListMappingsRequest { problems: true, ..Default::default() }).await;
    assert_eq!(last.tally.unwrap().extents, extents.len() as u64);
    agree(&bed, &extents, None).await;
    assert!(extents.iter().any(|extent| page(extent).nested_gpa.is_some()));
    bed.stop().await;
}

#[tokio::test]
async fn finds_what_leads_to_a_page() {
    let bed = Bed::plain().await;
    let gva = bed.landmark("kernel-text");
    let request = |gpa: u64, bytes| v1::FindMappingsRequest { gpa: number(gpa), bytes, ..Default::default() };
    let (found, _) = find(&bed, request(0x1_0123, None)).await;
    // The kernel's direct map, of 1 GiB, leads there, too.
    let spans: Vec<_> = found.iter().map(|it| (it.start, it.bytes)).collect();
    assert_eq!(spans, [(gva + 0x123, 1), (gva + (1 << 30) + 0x123, 1)]);
    let asked = v1::FindMappingsRequest { gpa: text("0x10ff0"), bytes: Some(0x20), ..Default::default() };
    let (found, _) = find(&bed, asked).await;
    // The two pages differ in their rights; the direct map has them in one.
    let spans: Vec<_> = found.iter().map(|it| (it.start, it.bytes)).collect();
    let direct = gva + (1 << 30) + 0xff0;
    assert_eq!(spans, [(gva + 0xff0, 0x10), (gva + 0x1000, 0x10), (direct, 0x20)]);
    let (found, last) = find(&bed, request(0x7fff_0000, None)).await;
    assert_eq!((found.len(), last.tally.unwrap().mapped_bytes), (0, 0));
    // Everything at once is everything that is mapped.
    let (found, _) = find(&bed, request(0, Some(u64::MAX))).await;
    assert_eq!(found, list(&bed, v1::ListMappingsRequest::default()).await.0);
    bed.stop().await;
}

#[tokio::test]
async fn a_range_says_what_single_translations_say() {
    let bed = Bed::plain().await;
    let (start, end) = (0xffff_8000_0000_0000_u64, 0xffff_8000_0060_0000_u64);
    for (kind, privilege) in [
        (v1::AccessKind::Read, v1::Privilege::Exempt),
        (v1::AccessKind::Write, v1::Privilege::Supervisor),
        (v1::AccessKind::Fetch, v1::Privilege::User),
    ] {
        let request = v1::TranslateRangeRequest {
            range: range(start, end),
            access: access(kind, privilege),
            ..Default::default()
        };
        let (extents, _) = parts!(bed.translation().translate_range(request).await.unwrap());
        let mut next = start;
        let mut faults = 0;
        for extent in &extents {
            assert_eq!(extent.start, next, "every address is in one extent");
            next += extent.bytes;
            let request = v1::TranslateRequest { access: access(kind, privilege), ..read(extent.start) };
            let single = bed.translate(request).await.unwrap();
            match (extent.outcome.as_ref().unwrap(), single.outcome.unwrap()) {
                (Outcome::Translation(page), v1::translate_response::Outcome::Translation(single)) => {
                    assert_eq!((page.gpa, page.effective), (single.gpa, single.effective));
                }
                (Outcome::Fault(fault), v1::translate_response::Outcome::Fault(single)) => {
                    faults += 1;
                    assert_eq!(*fault, single);
                }
                (extent, single) => panic!("{extent:?} {single:?}"),
            }
        }
        assert_eq!(next, end);
        assert!(faults > 2, "{extents:?}");
    }
    bed.stop().await;
}

#[tokio::test]
async fn a_budget_truncates_and_the_rest_can_be_had() {
    let bed = Bed::plain().await;
    let (all, _) = list(&bed, v1::ListMappingsRequest::default()).await;
    let (mut resumed, mut start, mut requests) = (Vec::new(), 0, 0);
    loop {
        let request = v1::ListMappingsRequest {
            range: Some(v1::GvaRange { start: number(start), end: None }),
            budget: Some(v1::MappingBudget { extents: Some(3), entries: None }),
            ..Default::default()
        };
        let (extents, last) = list(&bed, request).await;
        assert!(extents.len() <= 3);
        resumed.extend(extents);
        requests += 1;
        let Some(truncation) = last.truncation else { break };
        assert_eq!(truncation.limit(), v1::MappingLimit::Extents);
        assert!(truncation.continue_at > start);
        start = truncation.continue_at;
    }
    assert_eq!(resumed, all);
    assert_eq!(requests, all.len().div_ceil(3));
    bed.stop().await;
}

/// What is found begins and ends within pages, and comes once all the same, in one dimension and in two.
#[tokio::test]
async fn a_search_that_was_truncated_goes_on_where_it_says() {
    let bed = Bed::plain().await;
    let search = |gpa, range, extents| v1::FindMappingsRequest {
        gpa: number(gpa),
        bytes: Some(0x1000),
        range,
        budget: Some(v1::MappingBudget { extents, entries: None }),
        ..Default::default()
    };
    for nested in [false, true] {
        if nested {
            bed.walker().set_nested_mode(nested_on()).await.unwrap();
        }
        let (mapped, _) = list(&bed, v1::ListMappingsRequest::default()).await;
        // What an L2 maps first, and otherwise a page that is mapped twice.
        let gpa = if nested { page(&mapped[0]).gpa + 0x123 } else { 0x1_0123 };
        let (all, _) = find(&bed, search(gpa, None, None)).await;
        assert!(
            all.len() > usize::from(!nested) && all.iter().any(|it| it.start % 0x1000 == 0x123),
            "{all:x?}"
        );
        let (mut found, mut start) = (Vec::new(), 0);
        loop {
            let range = Some(v1::GvaRange { start: number(start), end: None });
            let (extents, last) = find(&bed, search(gpa, range, Some(1))).await;
            found.extend(extents);
            let Some(truncation) = last.truncation else { break };
            start = truncation.continue_at;
        }
        assert_eq!(found, all, "nothing is left out, and nothing comes twice");
    }
    bed.stop().await;
}

#[tokio::test]
async fn a_search_that_stops_within_a_page_goes_on() {
    let bed = Bed::plain().await;
    let request = |start, extents| v1::FindMappingsRequest {
        gpa: number(0x1_0123),
        range: Some(v1::GvaRange { start, end: None }),
        budget: Some(v1::MappingBudget { extents, entries: None }),
        ..Default::default()
    };
    let (all, _) = find(&bed, request(None, None)).await;
    let (mut found, last) = find(&bed, request(None, Some(1))).await;
    assert_eq!((all.len(), found.len()), (2, 1));
    let continue_at = last.truncation.expect("truncated").continue_at;
    assert_eq!(continue_at, all[1].start & !0xfff);
    let (rest, last) = find(&bed, request(number(continue_at), Some(1))).await;
    found.extend(rest);
    assert_eq!((found, last.truncation), (all, None));
    bed.stop().await;
}

#[tokio::test]
async fn refuses_what_is_no_list() {
    let bed = Bed::plain().await;
    let field = (Code::InvalidArgument, "INVALID_FIELD".to_owned());
    let list = |change: &dyn Fn(&mut v1::ListMappingsRequest)| {
        let mut request = v1::ListMappingsRequest::default();
        change(&mut request);
        request
    };
    let budget = |entries, extents| Some(v1::MappingBudget { entries, extents });
    let sizes = |page_sizes| Some(v1::MappingFilter { page_sizes, ..Default::default() });
    for (request, said) in [
        (list(&|it| it.range = range(0x2000, 0x1000)), "not above its start"),
        (list(&|it| it.range = range(0x2000, 0x2000)), "not above its start"),
        (list(&|it| it.range = range(0xffff_8000_0000_0000, 0x1000)), "not above its start"),
        (list(&|it| it.range = range(0x2000, 0)), "range.end"),
        (list(&|it| it.range = range(0x2001, 0x4000)), "range.start: 0x2001 is not aligned"),
        (list(&|it| it.range = range(0x2000, 0x4fff)), "range.end: 0x4fff is not aligned"),
        (list(&|it| it.range = range(1 << 47, 1 << 48)), "range.start"),
        (list(&|it| it.range = range(0, (1 << 47) + 0x1000)), "range.end"),
        (list(&|it| it.range = Some(v1::GvaRange { start: text("main"), end: None })), "main"),
        (list(&|it| it.budget = budget(Some(0), None)), "budget.entries"),
        (list(&|it| it.budget = budget(None, Some(0))), "budget.extents"),
        (list(&|it| it.budget = budget(Some(u64::MAX), None)), "budget.entries"),
        (list(&|it| it.filter = sizes(vec![0])), "filter.page_sizes"),
        (list(&|it| it.filter = sizes(vec![77])), "77"),
        (list(&|it| it.freshness = 9), "freshness"),
    ] {
        let asked = format!("{request:?}");
        let status = mappings(&bed).list_mappings(request).await.expect_err(&asked);
        assert!(status.message().contains(said), "{asked}: {status:?}");
        assert_eq!(refusal::<()>(Err(status)), field, "{asked}");
    }
    let request = v1::ListMappingsRequest {
        vcpu: Some(v1::VcpuRef { machine: "no".into(), vcpu: 0 }),
        ..Default::default()
    };
    let refused = refusal(mappings(&bed).list_mappings(request).await.map(|_| ()));
    assert_eq!(refused, (Code::NotFound, "MACHINE_NOT_FOUND".to_owned()));
    for (gpa, bytes) in [(None, None), (number(0), Some(0)), (number(u64::MAX), Some(2))] {
        let request = v1::FindMappingsRequest { gpa, bytes, ..Default::default() };
        assert_eq!(refusal(mappings(&bed).find_mappings(request).await.map(|_| ())), field);
    }
    for request in [
        v1::TranslateRangeRequest { range: range(0, 0x1000), ..Default::default() },
        v1::TranslateRangeRequest {
            access: access(v1::AccessKind::Read, v1::Privilege::User),
            ..Default::default()
        },
    ] {
        assert_eq!(refusal(bed.translation().translate_range(request).await.map(|_| ())), field);
    }
    bed.unharmed().await;
    bed.stop().await;
}

/// Where the demo machine has free memory for a table that refers to itself.
const BOMB: u64 = 0x30_0000;

/// The demo machine with a table whose every entry refers to the table itself.
pub(crate) fn bomb() -> Machine {
    let machine = open("demo:plain");
    let memory = machine.source().memory();
    for entry in (0..4096).step_by(8) {
        memory.write_u64(pagewalk::Gpa(BOMB + entry), BOMB | 7).unwrap();
    }
    machine
}

pub(crate) fn all_of_the_bomb() -> v1::ListMappingsRequest {
    let state = v1::WalkerOverride { cr3: Some(BOMB), ..Default::default() };
    v1::ListMappingsRequest { r#override: Some(state), ..Default::default() }
}

/// Over a connection of its own: what nobody reads of one stream fills the connection for all others.
async fn begun(bed: &Bed) -> Streaming<v1::ListMappingsResponse> {
    let mut own = MappingServiceClient::new(connect(bed.address).await);
    let mut stream = own.list_mappings(all_of_the_bomb()).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some_and(|part| !part.last && !part.extents.is_empty()));
    stream
}

/// Bytes of this process that are in memory.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bomb_is_cut_off() {
    let bed = Bed::of(config(), vec![bomb()]).await;
    let budget = Some(v1::MappingBudget { extents: Some(100_000), entries: None });
    let (extents, last) = list(&bed, v1::ListMappingsRequest { budget, ..all_of_the_bomb() }).await;
    assert_eq!(extents.len(), 100_000);
    let truncation = last.truncation.expect("truncated");
    assert_eq!((truncation.limit(), truncation.continue_at), (v1::MappingLimit::Extents, 100_000 << 12));
    // Nothing to show, and no end: entries end it.
    let budget = Some(v1::MappingBudget { entries: Some(1 << 22), extents: None });
    let request = v1::FindMappingsRequest {
        gpa: number(0x1000),
        r#override: all_of_the_bomb().r#override,
        budget,
        ..Default::default()
    };
    let (extents, last) = find(&bed, request).await;
    assert_eq!((extents.len(), last.truncation.unwrap().limit()), (0, v1::MappingLimit::Entries));
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_costs_little_and_holds_up_nobody() {
    let bed = Bed::of(config(), vec![bomb()]).await;
    let mut streams = Vec::new();
    for _ in 0..20 {
        streams.push(begun(&bed).await);
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let before = resident();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(resident() < before + (32 << 20), "{before} {}", resident());
    bed.unharmed().await;
    drop(streams);
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_ends_when_the_client_leaves() {
    let machine = bomb();
    let memory = machine.source().memory();
    let bed = Bed::of(config(), vec![machine]).await;
    // Searches without an end and without a find, so that nothing but leaving ends them early.
    let request = v1::FindMappingsRequest {
        gpa: number(0x1000),
        r#override: all_of_the_bomb().r#override,
        ..Default::default()
    };
    let holders = Arc::strong_count(&memory);
    let mut stream = mappings(&bed).find_mappings(request).await.unwrap().into_inner();
    let working = Instant::now();
    while Arc::strong_count(&memory) == holders {
        assert!(working.elapsed() < SOON, "the work begins");
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
    let first = timeout(SOON, stream.message()).await.unwrap().unwrap().expect("a word of how far it is");
    assert!(!first.last && first.position > 0);
    drop(stream);
    let left = Instant::now();
    // No slice holds the memory for 20 ms on end: none is made any more.
    let mut quiet = Instant::now();
    while quiet.elapsed() < Duration::from_millis(20) {
        if Arc::strong_count(&memory) > holders {
            quiet = Instant::now();
        }
        assert!(left.elapsed() < SOON, "the work goes on without a client");
        tokio::time::sleep(Duration::from_micros(100)).await;
    }
    let ended = quiet.duration_since(left);
    println!("a search without end: its work ends {ended:?} after the client has left");
    assert!(ended < Duration::from_millis(100), "{ended:?}");
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_ends_a_list() {
    let bed = Bed::of(config(), vec![bomb()]).await;
    let mut request = Request::new(all_of_the_bomb());
    request.set_timeout(Duration::from_millis(300));
    let mut stream = mappings(&bed).list_mappings(request).await.unwrap().into_inner();
    let begun = Instant::now();
    let ended = loop {
        match timeout(SOON, stream.message()).await.expect("an end in time") {
            Ok(Some(part)) => assert!(!part.last),
            Ok(None) => panic!("cut off without a word"),
            Err(status) => break status,
        }
    };
    assert!(matches!(ended.code(), Code::DeadlineExceeded | Code::Cancelled), "{ended:?}");
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    bed.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unary_calls_go_by_a_large_map() {
    let bed = Bed::of(config(), vec![bomb()]).await;
    let mut stream = begun(&bed).await;
    let reading = tokio::spawn(async move {
        let mut extents = 0;
        for _ in 0..2000 {
            match stream.message().await.unwrap() {
                Some(part) => extents += part.extents.len(),
                None => break,
            }
        }
        extents
    });
    let gva = bed.landmark("kernel-text");
    let mut times = Vec::new();
    while !reading.is_finished() && times.len() < 2000 {
        let start = Instant::now();
        bed.translate(read(gva)).await.unwrap();
        times.push(start.elapsed());
    }
    reading.abort();
    times.sort_unstable();
    let p99 = times[times.len() * 99 / 100];
    println!("unary beside a map: {} calls, median {:?}, p99 {p99:?}", times.len(), times[times.len() / 2]);
    // In a debug build, on a machine that builds beside it.
    assert!(p99 < Duration::from_millis(200), "{p99:?}");
    bed.stop().await;
}

/// 4 Mi pages, each an extent of its own: the time, and the memory that it takes. By hand, with `--ignored --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes 200 MiB and, in a debug build, a minute"]
async fn four_million_leaves() {
    const LEAVES: u64 = 4 << 20;
    for (case, scatter) in [("frames in order", false), ("scattered frames", true)] {
        let demo = open("demo:plain");
        let source = demo.source();
        let region = Region { start: pagewalk::Gpa(0), size: 128 << 20, read_only: false };
        let memory = Arc::new(GuestRam::allocate(&[region]).unwrap());
        let large = LocalSource {
            kind: "demo",
            description: "four million leaves".into(),
            vcpus: source.vcpus().to_vec(),
            memory: Arc::clone(&memory),
            capabilities: source.capabilities().clone(),
            cpu: source.cpu(),
            landmarks: Vec::new(),
            health: Health::default(),
        };
        let machine = Machine::new("demo", Arc::new(large));
        let put = |gpa: u64, entry: u64| memory.write_u64(pagewalk::Gpa(gpa), entry).unwrap();
        let root = 16 << 20;
        let (pdpt, directories) = (root + 0x1000, root + 0x2000);
        let tables = directories + 16 * 0x1000;
        put(root, pdpt | 7);
        for number in 0..16 {
            put(pdpt + number * 8, (directories + number * 0x1000) | 7);
        }
        for number in 0..LEAVES / 512 {
            put(directories + number * 8, (tables + number * 0x1000) | 7);
        }
        for page in 0..LEAVES {
            let frame = if scatter { page.wrapping_mul(0x9e37_79b1) & (LEAVES - 1) } else { page };
            put(tables + page * 8, frame << 12 | 7);
        }
        let bed = Bed::of(config(), vec![machine]).await;
        let state = v1::WalkerOverride { cr3: Some(root), ..Default::default() };
        let request = v1::ListMappingsRequest { r#override: Some(state), ..Default::default() };
        let before = resident();
        let start = Instant::now();
        let mut stream = mappings(&bed).list_mappings(request).await.unwrap().into_inner();
        let (mut extents, mut mapped, mut most) = (0, 0, before);
        while let Some(part) = stream.message().await.unwrap() {
            extents += part.extents.len();
            mapped = part.tally.unwrap().mapped_bytes;
            if extents % (64 * 2048) < 2048 {
                most = most.max(resident());
            }
        }
        println!(
            "4 Mi leaves, {case}: {extents} extents, {} GiB mapped, {:?}, at most {} MiB more than before, client included",
            mapped >> 30,
            start.elapsed(),
            (most - before) >> 20,
        );
        assert_eq!(mapped, LEAVES << 12);
        assert_eq!(extents, if scatter { LEAVES as usize } else { extents });
        bed.stop().await;
    }
}
