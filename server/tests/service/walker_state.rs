//! `GetWalkerState`, against values worked out by hand from the manuals.

use pagewalk_proto::v1;

use crate::bed::{Bed, from_plain, nested_off, nested_on};

const MAXPHYADDR: u32 = 48;
/// Bits 51:48.
const BEYOND: u64 = 0xf << MAXPHYADDR;

async fn state(bed: &Bed, freshness: v1::Freshness) -> v1::GetWalkerStateResponse {
    let request = v1::GetWalkerStateRequest { freshness: freshness.into(), ..Default::default() };
    bed.walker().get_walker_state(request).await.unwrap().into_inner()
}

/// CR0.WP, EFER.NXE; no SMEP, no SMAP, no keys.
fn gva_format() -> v1::PageFormat {
    let supervisor_read = 0x5555; // R clear
    let supervisor_write = 0x3333; // W clear, and WP
    let user_read = 0x5f5f; // R or U clear
    let user_write = 0x3f3f; // W or U clear
    let supervisor_fetch = 0x00ff; // X clear
    let user_fetch = 0x0fff; // X or U clear
    let data = [supervisor_read, supervisor_write, user_read, user_write];
    // No access writes and fetches; those words read as the fetch's.
    let fetch = [supervisor_fetch, supervisor_fetch, user_fetch, user_fetch];
    v1::PageFormat {
        mode: v1::PagingMode::FourLevel.into(),
        levels: 4,
        reserved_leaf: vec![
            BEYOND,
            BEYOND | 0x1f_e000,
            BEYOND | 0x3fff_e000,
            // AMD: MBZ are PS and bit 8.
            BEYOND | 0x180,
        ],
        reserved_table: vec![BEYOND, BEYOND, BEYOND, BEYOND | 0x100],
        permissions: [data, data, fetch, fetch].concat(),
        protection_key_mask: 0,
        bad_memory_type_xwr: 0,
        linear_width: 48,
        maxphyaddr: MAXPHYADDR,
        fetch_bit_reported: true,
        entry_bytes: 8,
        index_bits: 9,
        bits: Some(v1::EntryBits {
            present: 1,
            write: 2,
            user: 4,
            no_execute: 1 << 63,
            execute: 0,
            accessed: 1 << 5,
            dirty: 1 << 6,
            page_size: 1 << 7,
            global: 1 << 8,
            protection_key: 0,
            frame: 0xffff_ffff_f000,
        }),
        shadow_stacks: false,
        pointer_masking: None,
        encryption_mask: 0,
        mode_based_execute: false,
        supervisor_shadow_stack_control: false,
    }
}

#[tokio::test]
async fn one_dimension_by_hand() {
    let bed = Bed::plain().await;
    for freshness in [v1::Freshness::Latest, v1::Freshness::Sync] {
        let state = state(&bed, freshness).await;
        from_plain(state.provenance.as_ref());
        let walk = state.gva_walk.unwrap();
        assert_eq!((walk.root, walk.pdptrs.as_slice()), (0x2_0000, [].as_slice()));
        assert_eq!(walk.format, Some(gva_format()));
        assert_eq!(state.ngpa_walk, None);
        assert_eq!(state.nested.unwrap().kind(), v1::NestedModeKind::Off);
    }
    bed.stop().await;
}

#[tokio::test]
async fn registers_change_the_words() {
    const CR0_WP: u64 = 1 << 16;
    let cr4 = |bits: u64| Some(0x6a0 | bits);
    let (smep, smap, pke, la57) = (1 << 20, 1 << 21, 1 << 22, 1 << 12);
    let bed = Bed::plain().await;
    let set = async |registers| {
        let request = v1::SetRegistersRequest { registers: Some(registers), ..Default::default() };
        bed.vcpu().set_registers(request).await.unwrap();
        state(&bed, v1::Freshness::Latest).await
    };
    let format = |state: &v1::GetWalkerStateResponse| state.gva_walk.clone().unwrap().format.unwrap();
    let before = state(&bed, v1::Freshness::Latest).await.provenance.unwrap().generation;

    let without_wp = set(v1::Registers { cr0: Some(0x8000_0033), ..Default::default() }).await;
    assert_eq!(without_wp.provenance.as_ref().unwrap().generation, before + 1);
    let words = format(&without_wp).permissions;
    assert_eq!((words[1], words[3]), (0, 0x3f3f), "a supervisor writes anywhere; a user does not");

    let registers =
        v1::Registers { cr0: Some(0x8000_0033 | CR0_WP), cr4: cr4(smep | smap), ..Default::default() };
    let words = format(&set(registers).await).permissions;
    // SMAP refuses user pages to explicit data accesses without AC; SMEP user pages to fetches.
    assert_eq!((words[0], words[4], words[8]), (0xf5f5, 0x5555, 0xf0ff));

    let keys = format(&set(v1::Registers { cr4: cr4(pke), ..Default::default() }).await);
    assert_eq!(keys.bits.unwrap().protection_key, 0xf << 59);
    // Of a user page: reads look at AD; writes by a user, or by a supervisor under WP, at AD and WD; fetches at neither.
    let field = |index: u32| keys.protection_key_mask >> (2 * index) & 3;
    let fields: Vec<u32> = (0..16).map(field).collect();
    assert_eq!(fields[..8], [0, 0, 0, 0, 1, 3, 1, 3]);
    assert_eq!(fields[8..], [0; 8]);

    let wide = format(&set(v1::Registers { cr4: cr4(la57), ..Default::default() }).await);
    assert_eq!((wide.levels, wide.linear_width), (5, 57));
    assert_eq!((wide.reserved_leaf.len(), wide.reserved_table.len()), (5, 5));

    let plain_nx = set(v1::Registers { cr4: cr4(0), efer: Some(0x500), ..Default::default() }).await;
    let format = format(&plain_nx);
    assert_eq!((format.bits.unwrap().no_execute, format.fetch_bit_reported), (0, false));
    assert!(format.reserved_leaf.iter().chain(&format.reserved_table).all(|mask| mask >> 63 == 1));
    bed.stop().await;
}

#[tokio::test]
async fn nested_and_back_is_as_before() {
    let bed = Bed::plain().await;
    let before = state(&bed, v1::Freshness::Latest).await;
    let switched = bed.walker().set_nested_mode(nested_on()).await.unwrap().into_inner();
    let effect = switched.effect.unwrap();
    assert_eq!(effect.kind(), v1::NestedEffectKind::WalkerOnly);
    assert!(!effect.reason.is_empty());
    let on = switched.state.unwrap();
    from_plain(on.provenance.as_ref());
    let gva_walk = on.gva_walk.clone().unwrap();
    assert_eq!((gva_walk.root, gva_walk.format), (0x1000, Some(gva_format())));
    let ngpa_walk = on.ngpa_walk.clone().unwrap();
    assert_eq!(ngpa_walk.root, 0x5_0000);
    let npt = ngpa_walk.format.unwrap();
    assert_eq!((npt.levels, npt.mode()), (4, v1::PagingMode::FourLevel));
    // NPT: every access is a user access, whoever makes it, and WP, SMEP and SMAP have no say.
    assert_eq!((npt.permissions[2], npt.permissions[3], npt.permissions[10]), (0x5f5f, 0x3f3f, 0x0fff));
    let nested = on.nested.clone().unwrap();
    assert_eq!(nested.kind(), v1::NestedModeKind::WalkerOnly);
    let npt = v1::Npt {
        ncr3: 0x5_0000,
        host_cr0: Some(0x8001_0001),
        host_cr4: Some(0x20),
        host_efer: Some(0x1d00),
        guest_mode_execute_trap: false,
    };
    assert_eq!(nested.second_dimension, Some(v1::nested_mode::SecondDimension::Npt(npt)));
    let got = state(&bed, v1::Freshness::Sync).await;
    assert_eq!((got.gva_walk, got.ngpa_walk, got.nested), (on.gva_walk, on.ngpa_walk, on.nested));

    let again = bed.walker().set_nested_mode(nested_on()).await.unwrap().into_inner();
    assert_eq!(again.effect.unwrap().kind(), v1::NestedEffectKind::Unchanged);
    bed.walker().set_nested_mode(nested_off()).await.unwrap();
    let after = state(&bed, v1::Freshness::Latest).await;
    assert_eq!((&after.gva_walk, &after.ngpa_walk, &after.nested), (&before.gva_walk, &None, &before.nested));
    let generation = |state: &v1::GetWalkerStateResponse| state.provenance.as_ref().unwrap().generation;
    assert_eq!(generation(&after), generation(&before) + 2);
    bed.stop().await;
}
