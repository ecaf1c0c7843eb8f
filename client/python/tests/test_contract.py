"""The package says everything that the contract says, in the same words."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, get_args

import pytest

from pagewalk import answers, convert
from pagewalk.v1 import machine_pb2, mapping_pb2, translation_pb2, types_pb2, vcpu_pb2, walker_pb2

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor, EnumDescriptor

CHOICES = [
    (answers.AccessKind, types_pb2.AccessKind.DESCRIPTOR),
    (answers.Privilege, types_pb2.Privilege.DESCRIPTOR),
    (answers.AdPolicy, types_pb2.AdPolicy.DESCRIPTOR),
    (answers.Freshness, types_pb2.Freshness.DESCRIPTOR),
    (answers.Vendor, types_pb2.Vendor.DESCRIPTOR),
    (answers.RunState, types_pb2.RunState.DESCRIPTOR),
    (answers.Backing, types_pb2.Backing.DESCRIPTOR),
    (answers.MemoryType, types_pb2.MemoryType.DESCRIPTOR),
    (answers.FaultKind, types_pb2.FaultKind.DESCRIPTOR),
    (answers.SymbolPlacement, machine_pb2.SymbolPlacement.DESCRIPTOR),
    (answers.NestedPhase, translation_pb2.NestedPhase.DESCRIPTOR),
    (answers.Dimension, types_pb2.Dimension.DESCRIPTOR),
    (answers.PagingMode, types_pb2.PagingMode.DESCRIPTOR),
    (answers.NestedModeKind, types_pb2.NestedModeKind.DESCRIPTOR),
    (answers.NestedEffectKind, walker_pb2.NestedEffectKind.DESCRIPTOR),
]


@pytest.mark.parametrize(("literal", "enum"), CHOICES, ids=lambda value: getattr(value, "name", ""))
def test_choices_are_the_contracts(literal: Any, enum: EnumDescriptor) -> None:
    assert set(get_args(literal)) - {"unspecified"} == set(convert.choices(enum)) - {"unspecified"}


#: Fields that go by another name here, because Python has taken theirs or another one says it better.
RENAMED = {"global": "global_page", "effective": "rights"}
OUTCOME = {"address", "steps", "explanation", "provenance", "symbol"}

VALUES: list[tuple[type, Descriptor, set[str]]] = [
    (answers.Provenance, types_pb2.Provenance.DESCRIPTOR, set()),
    (answers.Rights, types_pb2.Rights.DESCRIPTOR, set()),
    (answers.Symbol, types_pb2.Symbol.DESCRIPTOR, set()),
    (answers.Symbols, machine_pb2.Symbols.DESCRIPTOR, set()),
    (answers.Step, types_pb2.Step.DESCRIPTOR, set()),
    (answers.EptMemoryType, types_pb2.EptMemoryType.DESCRIPTOR, set()),
    (answers.Translation, types_pb2.Translation.DESCRIPTOR, OUTCOME | {"gva"}),
    (answers.Fault, types_pb2.Fault.DESCRIPTOR, OUTCOME - {"address"}),
    (answers.EntryBits, types_pb2.EntryBits.DESCRIPTOR, set()),
    (answers.PageFormat, types_pb2.PageFormat.DESCRIPTOR, set()),
    (answers.PointerMasking, types_pb2.PointerMasking.DESCRIPTOR, set()),
    (answers.PageWalk, types_pb2.PageWalk.DESCRIPTOR, set()),
    (answers.Npt, types_pb2.Npt.DESCRIPTOR, set()),
    (answers.Ept, types_pb2.Ept.DESCRIPTOR, set()),
    (answers.WalkerState, walker_pb2.GetWalkerStateResponse.DESCRIPTOR, set()),
    (answers.Registers, types_pb2.Registers.DESCRIPTOR, {"provenance"}),
    (answers.Vcpu, vcpu_pb2.VcpuInfo.DESCRIPTOR, set()),
    (answers.AddressSpace, mapping_pb2.AddressSpace.DESCRIPTOR, set()),
    (answers.Stepped, vcpu_pb2.StepVcpuResponse.DESCRIPTOR, set()),
    (answers.MemoryRegion, machine_pb2.MemoryRegion.DESCRIPTOR, set()),
    (answers.Capabilities, machine_pb2.Capabilities.DESCRIPTOR, set()),
    (answers.Landmark, machine_pb2.Landmark.DESCRIPTOR, set()),
    (answers.Machine, machine_pb2.Machine.DESCRIPTOR, set()),
    (answers.DecodedBit, translation_pb2.DecodedBit.DESCRIPTOR, set()),
]


@pytest.mark.parametrize(("value", "message", "extra"), VALUES, ids=lambda value: getattr(value, "__name__", ""))
def test_values_have_the_contracts_fields(value: Any, message: Descriptor, extra: set[str]) -> None:
    here = {field.name for field in dataclasses.fields(value)}
    there = {RENAMED.get(field.name, field.name) for field in message.fields}
    assert here - extra == there


def test_second_dimension_is_one_field_of_three() -> None:
    """WalkerOverride and NestedMode join the members of a oneof, so that no two of them can be set."""
    for value, message in (
        (answers.WalkerOverride, types_pb2.WalkerOverride.DESCRIPTOR),
        (answers.NestedMode, types_pb2.NestedMode.DESCRIPTOR),
    ):
        here = {field.name for field in dataclasses.fields(value)}
        joined = {field.name for field in message.oneofs_by_name["second_dimension"].fields}
        assert here - {"second_dimension"} == {field.name for field in message.fields} - joined
