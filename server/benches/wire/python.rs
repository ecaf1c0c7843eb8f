//! The Python client, if this host has what it needs: a batch of 65,536 as a numpy array, next to numbers in a list.

use std::path::Path;
use std::process::Command;

use super::bed::child::{Other, Way, Who};
use super::bed::guest::{BATCH, Shape};
use super::bed::report::Report;

const SCRIPT: &str = r#"
import sys, time
import grpc
import numpy as np
import pagewalk
from pagewalk.v1 import translation_pb2, translation_pb2_grpc, types_pb2

target, echoes, (rounds, count, base) = sys.argv[1], sys.argv[2], map(int, sys.argv[3:])
with pagewalk.connect(target) as client:
    column = np.random.default_rng(1).integers(0, 512, count, dtype=np.uint64) * 4096 + np.uint64(base)
    plain = [int(address) for address in column]
    stub = translation_pb2_grpc.TranslationServiceStub(client._channel)
    access = types_pb2.Access(kind=types_pb2.ACCESS_KIND_READ, privilege=types_pb2.PRIVILEGE_SUPERVISOR)

    def arrays():
        assert client.translate_batch(column, privilege="supervisor", machine="hot").ok.all()

    def numbers():
        request = translation_pb2.BatchTranslateRequest(
            vcpu=types_pb2.VcpuRef(machine="hot"), access=access, addresses=plain)
        assert all(word & 1 for word in stub.BatchTranslate(request).words)

    request = translation_pb2.TranslateRequest(
        vcpu=types_pb2.VcpuRef(machine="hot"), address=types_pb2.Address(number=base), access=access)
    size, back = request.ByteSize() - 2, stub.Translate(request).ByteSize() - 2
    payload = bytes([10, size, back]) + bytes(size - 1)
    channel = grpc.insecure_channel(echoes, [("grpc.default_authority", "localhost")])
    sized = channel.unary_unary("/pagewalk.bench.Echo/Sized")

    def single():
        for _ in range(200):
            stub.Translate(request)

    def echo():
        for _ in range(200):
            sized(payload)

    for _ in range(rounds):
        times = []
        for work, size in ((arrays, count), (numbers, count), (single, 200), (echo, 200)):
            start = time.perf_counter_ns()
            work()
            times.append((time.perf_counter_ns() - start) / size)
        print(*times)
"#;

const BATCH_CASE: &str = "Python, translate_batch, numpy, hot, Unix";
const SINGLE_CASE: &str = "Python, Translate, hot, Unix";

pub(super) fn compare(report: &mut Report, other: &Other, short: bool) {
    let python = std::env::var("PAGEWALK_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let package = Path::new(env!("CARGO_MANIFEST_DIR")).join("../client/python/src");
    let search = std::env::var("PYTHONPATH").unwrap_or_default();
    let rounds = if short { "1" } else { "15" };
    let base = Shape::Hot.batch(0)[0] & !0x1f_ffff;
    let output = Command::new(python)
        .args(["-c", SCRIPT, &other.target(Who::Daemon, Way::Unix), &other.target(Who::Layered, Way::Unix)])
        .args([rounds, &BATCH.to_string(), &base.to_string()])
        .env("PYTHONPATH", format!("{}:{search}", package.display()))
        .output();
    let said = match output {
        Ok(output) if output.status.success() => Ok(String::from_utf8(output.stdout).unwrap()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(said.lines().last().unwrap_or_default().to_owned())
        }
        Err(error) => Err(error.to_string()),
    };
    let said = match said {
        Ok(said) => said,
        Err(reason) => {
            return [BATCH_CASE, SINGLE_CASE].into_iter().for_each(|case| report.skip(case, &reason));
        }
    };
    let mut columns = [Vec::new(), Vec::new(), Vec::new(), Vec::new()];
    for line in said.lines() {
        for (column, figure) in columns.iter_mut().zip(line.split_whitespace()) {
            column.push(figure.parse().unwrap());
        }
    }
    let [arrays, numbers, single, echo] = columns;
    report.add(BATCH_CASE, "ns an address", arrays, "generated stub, list", numbers);
    report.add(SINGLE_CASE, "ns a call", single, "echo behind the same layers", echo);
}
