//! Whatever a request contains, the daemon gives an answer, or a status that says what is wrong with it.

use pagewalk_proto::v1;
use pagewalk_proto::v1::explain_fault_request::Seen;
use pagewalk_proto::v1::set_nested_mode_request::Mode;
use pagewalk_proto::v1::walker_override::SecondDimension;
use proptest::option::{of, weighted};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::bed::{Bed, nested_off, refusal};

/// Numbers at which arithmetic goes wrong, those that make sense here, and any.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        3 => any::<u64>(),
        2 => (0_u32..64).prop_map(|bit| 1 << bit),
        2 => (0_u32..64).prop_map(|bit| u64::MAX << bit),
        2 => (0_u64..0x800).prop_map(|page| page << 12),
        1 => Just(0),
        1 => Just(u64::MAX),
    ]
}

/// Registers that often make a walk.
fn cr0() -> impl Strategy<Value = u64> {
    prop_oneof![12 => Just(0x8001_0033), 1 => Just(0x11), 4 => Just(0x8000_0011), 1 => word()]
}

fn cr3() -> impl Strategy<Value = u64> {
    let roots = prop::sample::select(vec![0x1000_u64, 0x2_0000, 0x2_1000, 0x5_0000, 0x7f_f000, 0x80_0000]);
    prop_oneof![12 => roots, 1 => (0_u64..0x800).prop_map(|page| page << 12), 1 => word()]
}

fn cr4() -> impl Strategy<Value = u64> {
    let bits = prop::sample::subsequence(vec![5_u32, 7, 12, 20, 21, 22], 0..6);
    prop_oneof![12 => bits.prop_map(|bits| bits.into_iter().fold(0x20, |cr4, bit| cr4 | 1 << bit)), 1 => word()]
}

fn efer() -> impl Strategy<Value = u64> {
    prop_oneof![12 => prop::sample::select(vec![0xd00_u64, 0x500, 0x1d00, 0xd00, 0xd00, 0]), 1 => word()]
}

fn address() -> impl Strategy<Value = Option<v1::Address>> {
    use v1::address::Value;
    let gva = prop_oneof![
        2 => (0_u64..0x20).prop_map(|page| 0xffff_8000_0001_0000 + (page << 12)),
        1 => (0_u64..8).prop_map(|page| 0xffff_ffff_8100_0000 + (page << 12)),
        1 => (0_u64..8).prop_map(|page| 0x40_0000 + (page << 12)),
        2 => word(),
    ];
    let value = prop_oneof![
        6 => gva.prop_map(Value::Number),
        1 => word().prop_map(|number| Value::Text(format!("{number:#x}"))),
        1 => ".{0,100}".prop_map(Value::Text),
    ];
    weighted(0.97, weighted(0.97, value).prop_map(|value| v1::Address { value }))
}

prop_compose! {
    fn npt()(ncr3 in cr3(), host_cr4 in of(cr4()), host_efer in of(efer()), host_cr0 in of(cr0())) -> v1::Npt {
        v1::Npt { ncr3, host_cr4, host_efer, host_cr0, ..Default::default() }
    }
}

prop_compose! {
    /// Half of them sound: memory type 6, walk length 4 or 5, a root in or out of memory.
    fn ept()(
        eptp in prop_oneof![
            1 => word(),
            1 => (0..0x900_u64, 3..=4_u64, 0..2_u64)
                .prop_map(|(frame, length, bits)| frame << 12 | bits << 6 | length << 3 | 6),
        ],
        mode_based_execute in any::<bool>(),
        capabilities in of(word()),
        tables_written in any::<bool>(),
    ) -> v1::Ept {
        v1::Ept { eptp, mode_based_execute, capabilities, tables_written }
    }
}

fn second_dimension() -> impl Strategy<Value = SecondDimension> {
    prop_oneof![
        6 => npt().prop_map(SecondDimension::Npt),
        2 => ept().prop_map(SecondDimension::Ept),
        2 => any::<bool>().prop_map(SecondDimension::None),
    ]
}

prop_compose! {
    fn walker_override()(
        registers in (of(cr0()), of(cr3()), of(cr4()), of(efer()), of(word())),
        maxphyaddr in weighted(0.2, prop_oneof![8 => 32_u32..=52, 1 => any::<u32>()]),
        pdptrs in prop_oneof![20 => Just(vec![]), 1 => prop::collection::vec(word(), 0..6)],
        second_dimension in of(second_dimension().boxed()),
        gib_pages in of(any::<bool>()),
        vendor in weighted(0.3, 0..4),
    ) -> v1::WalkerOverride {
        let (cr0, cr3, cr4, efer, pat) = registers;
        v1::WalkerOverride { cr0, cr3, cr4, efer, maxphyaddr, pdptrs, second_dimension, pat, gib_pages, vendor }
    }
}

fn vcpu() -> impl Strategy<Value = Option<v1::VcpuRef>> {
    let named = (prop_oneof![Just(String::new()), Just("demo".to_owned()), ".{0,8}"], 0_u32..2);
    prop_oneof![
        8 => Just(None),
        1 => named.prop_map(|(machine, vcpu)| Some(v1::VcpuRef { machine, vcpu })),
    ]
}

prop_compose! {
    fn access()(
        kind in prop_oneof![40 => 1..=3, 1 => any::<i32>(), 4 => 4..=5],
        privilege in prop_oneof![40 => 0..=5, 1 => any::<i32>()],
        ac in of(any::<bool>()),
        pkru in of(any::<u32>()),
        pkrs in prop_oneof![8 => Just(None), 1 => of(any::<u32>())],
        stack in any::<bool>(),
    ) -> v1::Access {
        v1::Access { kind, privilege, ac, pkru, pkrs, stack }
    }
}

prop_compose! {
    fn translate()(
        vcpu in vcpu(), address in address(), access in prop_oneof![8 => access().prop_map(Some), 1 => Just(None)],
        ad_policy in prop_oneof![40 => 0..=2, 1 => any::<i32>()],
        freshness in prop_oneof![40 => 0..=2, 1 => any::<i32>()],
        r#override in of(walker_override().boxed()),
        (trace, explain, validate) in any::<(bool, bool, bool)>(),
    ) -> v1::TranslateRequest {
        v1::TranslateRequest { vcpu, address, access, ad_policy, freshness, r#override, trace, explain, validate }
    }
}

fn seen() -> impl Strategy<Value = Seen> {
    prop_oneof![
        (prop_oneof![4 => 0_u32..8, 2 => 0_u32..64, 1 => any::<u32>()], address())
            .prop_map(|(error_code, cr2)| Seen::PageFault(v1::PageFault { error_code, cr2 })),
        (
            prop_oneof![4 => (4_u64..8, 1_u64..3).prop_map(|(low, high)| high << 32 | low), 1 => word()],
            address()
        )
            .prop_map(|(exit_info_1, nested_gpa)| {
                Seen::NestedPageFault(v1::NestedPageFault { exit_info_1, nested_gpa })
            }),
        (prop_oneof![4 => 0_u64..0x4000, 1 => word()], address(), of(address())).prop_map(
            |(exit_qualification, nested_gpa, gva)| {
                let gva = gva.flatten();
                Seen::EptViolation(v1::EptViolation { exit_qualification, nested_gpa, gva })
            }
        ),
        address()
            .prop_map(|nested_gpa| { Seen::EptMisconfiguration(v1::EptMisconfiguration { nested_gpa }) }),
    ]
}

prop_compose! {
    fn explain_fault()(
        vcpu in vcpu(),
        seen in weighted(0.97, seen().boxed()),
        cr3 in of(cr3()),
        freshness in prop_oneof![40 => 0..=2, 1 => any::<i32>()],
        r#override in of(walker_override().boxed()),
    ) -> v1::ExplainFaultRequest {
        v1::ExplainFaultRequest { vcpu, seen, cr3, freshness, r#override }
    }
}

prop_compose! {
    fn set_nested_mode()(
        vcpu in vcpu(),
        mode in weighted(0.97, prop_oneof![
            6 => npt().prop_map(Mode::Npt),
            1 => ept().prop_map(Mode::Ept),
            1 => any::<bool>().prop_map(Mode::Off),
        ]),
        l2 in of((of(cr0()), of(cr3()), of(cr4()), of(efer()), of(word()), prop_oneof![9 => Just(None), 1 => of(word())])
            .prop_map(|(cr0, cr3, cr4, efer, pat, rip)| {
                v1::Registers { cr0, cr3, cr4, efer, pat, rip, ..Default::default() }
            })),
        walker_only in any::<bool>(),
    ) -> v1::SetNestedModeRequest {
        v1::SetNestedModeRequest { vcpu, mode, l2, walker_only, ..Default::default() }
    }
}

#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "one lives at a time")]
enum Ask {
    Translate(v1::TranslateRequest),
    Explain(v1::ExplainFaultRequest),
    Nested(v1::SetNestedModeRequest),
}

#[test]
fn anything_gets_an_answer_or_a_reason() {
    const CASES: u32 = 3000;
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let bed = runtime.block_on(Bed::plain());
    let ask = prop_oneof![
        5 => translate().prop_map(Ask::Translate).boxed(),
        3 => explain_fault().prop_map(Ask::Explain).boxed(),
        1 => set_nested_mode().prop_map(Ask::Nested).boxed(),
    ];
    let config = Config { cases: CASES, failure_persistence: None, ..Config::default() };
    let counts = std::cell::Cell::new(([0_u32; 3], [0_u32; 3]));
    let result = TestRunner::new(config).run(&ask, |ask| {
        let (kind, answer) = runtime.block_on(async {
            match ask {
                Ask::Translate(request) => (
                    0,
                    bed.translate(request).await.map(|answer| {
                        assert!(answer.outcome.is_some() && answer.provenance.is_some());
                        assert!(answer.steps.len() <= 35);
                    }),
                ),
                Ask::Explain(request) => (
                    1,
                    bed.translation().explain_fault(request).await.map(|answer| {
                        let answer = answer.into_inner();
                        assert!(!answer.explanation.is_empty() && answer.provenance.is_some());
                        assert_eq!(answer.fault.is_some(), answer.would_fault_now);
                    }),
                ),
                Ask::Nested(request) => {
                    let answer = bed.walker().set_nested_mode(request).await;
                    (2, answer.map(|answer| assert!(answer.into_inner().state.is_some())))
                }
            }
        });
        let (mut answered, mut refused) = counts.get();
        match answer {
            Ok(()) => answered[kind] += 1,
            Err(status) => {
                refusal(Err::<(), _>(status));
                refused[kind] += 1;
            }
        }
        counts.set((answered, refused));
        Ok(())
    });
    result.unwrap();
    let (answered, refused) = counts.get();
    assert!(answered.iter().chain(&refused).all(|&count| count > CASES / 100), "{answered:?} {refused:?}");
    runtime.block_on(async {
        bed.walker().set_nested_mode(nested_off()).await.unwrap();
        bed.unharmed().await;
        bed.stop().await;
    });
}
