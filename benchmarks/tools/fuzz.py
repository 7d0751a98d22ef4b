"""Fuzzing of the server: Schemathesis over the OpenAPI document, malformed bodies, and malformed byte streams over sockets.

    python -m benchmarks.tools.fuzz --cases 5000 --schemathesis PATH/TO/schemathesis

Schemathesis (pip install schemathesis, in an environment of its own) runs over the served document, then over one narrowed to
valid model names and short answers, so that more cases reach the engine, which has a tiny random model. Then --malformed
bodies and as many byte streams are sent: each must be refused with a 4xx; a byte stream may also be closed unanswered. No reply
may be a 5xx, the server must still answer at the end, and its resident memory must not grow by more than 64 MiB after the first
tenth. Exits with status 1 otherwise.
"""

from __future__ import annotations

import argparse
import collections
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from benchmarks.common import argument_parser, finish
from benchmarks.tools.served import Served, served
from tests.serve.malformed import bodies, streams

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,unsupported_method"
)
WHOLE_CHECKS = f"{CHECKS},negative_data_rejection"  # the server accepts some input that the narrowed document forbids
GROWTH = 64 << 20  # bytes that memory may grow by after the first tenth: caches that fill, arenas


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--cases", type=int, default=5000, help="cases of Schemathesis; 0 skips it")
    parser.add_argument("--malformed", type=int, default=2000, help="malformed bodies, and as many byte streams")
    parser.add_argument("--schemathesis", default=shutil.which("schemathesis"), help="path of its program")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "fuzz"}
    bad: list[str] = []
    with served(
        "--engine", "tiny", "--request-seconds", "20", "--head-seconds", "0.5", "--body-seconds", "0.5"
    ) as server:
        if arguments.cases:
            result["schemathesis"] = schemathesis(server, arguments, bad)
        result["bodies"] = send_bodies(server, arguments, bad)
        result["streams"] = send_streams(server, arguments, bad)
        time.sleep(1.0)
        alive = httpx.get(f"{server.url}/health").status_code == 200
        result |= {"alive": alive, "open": server.inside().open}
    for line in bad[:20]:
        print(f"wrong: {line}")
    finish({**result, "wrong": len(bad)})
    if bad or not alive:
        sys.exit(1)


def schemathesis(server: Served, arguments: argparse.Namespace, bad: list[str]) -> dict[str, int]:
    """Runs over the served document, then over the narrowed one until `cases` cases have run."""
    if not arguments.schemathesis:
        sys.exit("schemathesis is not installed: pip install it in an environment of its own and give --schemathesis")
    counts: collections.Counter[str] = collections.Counter()
    document = httpx.get(f"{server.url}/openapi.json").json()
    num_operations = sum(map(len, document["paths"].values()))
    runs = chain([(document, WHOLE_CHECKS)], repeat((narrowed(document), CHECKS)))
    while counts["generated"] < arguments.cases:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "openapi.json"
            described, checks = next(runs)
            path.write_text(json.dumps(described))
            seed = arguments.seed + counts["runs"]
            command = [arguments.schemathesis, "run", path, "--url", server.url, "--checks", checks, "--seed", seed]
            command += ["-n", arguments.cases // (2 * num_operations) + 1, "--continue-on-failure", "--report", "json"]
            command += ["--phases", "coverage,fuzzing", "--suppress-health-check", "all", "--warnings", "off"]
            command += ["--report-json-path", path.with_name("report.json"), "--request-timeout", 30]
            plain = [str(each) for each in command]
            done = subprocess.run(plain, capture_output=True, text=True, check=False, cwd=folder)
            report = json.loads(path.with_name("report.json").read_text())
        counts.update(report["test_cases"])
        counts["runs"] += 1
        print(f"schemathesis: {counts['generated']} cases", flush=True)
        if done.returncode:
            bad.append(done.stdout[-6000:])
    counted = {"runs": counts["runs"], "cases": counts["generated"], "failures": counts["with_failures"]}
    print(f"schemathesis: {counted}", flush=True)
    return counted


def narrowed(document: dict[str, Any]) -> dict[str, Any]:
    """The document narrowed to the server's model, the known roles and short answers."""
    document = json.loads(json.dumps(document))
    for schema in document["components"]["schemas"].values():
        for name, field in schema.get("properties", {}).items():
            if name == "model":
                schema["properties"][name] = {"enum": ["tiny"]}
            elif name == "role":
                schema["properties"][name] = {"enum": ["system", "user", "assistant", "tool"]}
            elif name in ("max_tokens", "max_completion_tokens"):
                schema["properties"][name] = {"type": "integer", "minimum": 1, "maximum": 16}
            elif name == "messages" and field.get("type") == "array":
                field["minItems"] = 1
    return dict(document)


def send_bodies(server: Served, arguments: argparse.Namespace, bad: list[str]) -> dict[str, Any]:
    counts: collections.Counter[str] = collections.Counter()
    resident = []
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for number, (kind, path, body) in enumerate(islice(bodies(arguments.seed), arguments.malformed)):
            reply = client.post(path, content=body, headers={"content-type": "application/json"})
            counts[str(reply.status_code)] += 1
            if not 400 <= reply.status_code < 500 or "error" not in reply.json():
                bad.append(f"{kind} at {path}: {reply.status_code}: {body[:200]!r}")
            if number in (arguments.malformed // 10, arguments.malformed - 1):
                resident.append(server.inside().resident)
    return judged("bodies", counts, resident, bad)


def send_streams(server: Served, arguments: argparse.Namespace, bad: list[str]) -> dict[str, Any]:
    counts: collections.Counter[str] = collections.Counter()
    resident = []
    drawn = list(islice(streams(arguments.seed), arguments.malformed))
    tenth = len(drawn) // 10
    with ThreadPoolExecutor(16) as pool:
        for part in (drawn[:tenth], drawn[tenth:]):
            replies = pool.map(lambda each: statuses_of(server.url, each[1]), part)
            for (kind, data), statuses in zip(part, replies, strict=True):
                counts[statuses[-1] if statuses else "closed"] += 1
                if any(not "400" <= status < "500" for status in statuses):
                    bad.append(f"{kind}: {statuses}: {data[:200]!r}")
            resident.append(server.inside().resident)
    return judged("streams", counts, resident, bad)


def judged(name: str, counts: collections.Counter[str], resident: list[int], bad: list[str]) -> dict[str, Any]:
    if resident[-1] - resident[0] > GROWTH:
        bad.append(f"{name}: resident memory went from {resident[0]} to {resident[-1]} bytes")
    counted = {"replies": dict(counts), "resident": resident}
    print(f"{name}: {counted}", flush=True)
    return counted


def statuses_of(url: str, data: bytes) -> list[str]:
    """The statuses of all replies until the server closes or stops sending; 'stuck' if it does neither."""
    address = urlsplit(url)
    received = b""
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        try:
            connection.sendall(data)
            while part := connection.recv(1 << 16):
                received += part
                connection.settimeout(0.3)
        except ConnectionError:
            pass
        except TimeoutError:
            received = received or b"HTTP/1.1 stuck"
    return [line.split()[1].decode() for line in received.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]


if __name__ == "__main__":
    main()
