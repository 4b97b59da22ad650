"""What a CPU cannot show, measured on one NVIDIA GPU: results, speed, memory and bytes moved.

Command: python experiments/gpu.py --output=runs/gpu [--parts=device,forms,...]
Needs:   one GPU and `make cuda`; PyTorch, torchvision and timm for what is compared with them.

Each part is a process with a time limit below ten minutes and writes one PART.json, with the card,
driver, versions, number of tries and spread; what it printed is in PART.log. A part whose file is
there is not run again. At the end stands a table, also in table.md. `--rehearse` takes tiny
networks, for a machine without a GPU.

Parts:   device      bandwidth of a copy, rate of a product, and the error of float32 products
         forms       in-place blocks against concatenated ones, both against float64
         resume      a killed run ends bitwise as one that was not killed
         pretrained  logits of converted random weights against torchvision and timm
         NAME_BATCH  seconds of a step, side by side with PyTorch; bytes moved; memory
         memory      temporary memory by depth
         fashion     the card configs/fashion_mnist.py, if the images are there
"""

import argparse
import concurrent.futures
import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

sys.path.append(str(pathlib.Path(__file__).parent / "benchmarks"))

import compare
import jax
import jax.numpy as jnp
import layouts
import memory_by_depth
import numpy as np
import script
from networks import Work
from turns import alternate

import densejax
from densejax import models, pretrained
from densejax.config import UserError
from densejax.runs import formats, workdir
from densejax.topology import roofline

ROOT = pathlib.Path(densejax.__file__).parents[1]
MODES = ("train", "inference")
EVERYWHERE = ("card_and_driver", "versions", "code", "date", "seconds")  # keys of each result
PEERS = ("torchvision:channels_last", "torch_compile:channels_last", "torch_graphs:channels_last")
TIMM = {"identity": False}  # as timm's VoVNets are
SPEED = {
    "densenet_bc_100_12_64": Work("densenet_bc_100_12", 64, dtype="bfloat16"),
    "densenet121_128": Work("densenet121", 128, dtype="bfloat16"),
    "resnet50_128": Work("resnet50", 128, dtype="bfloat16"),
    "densenet_bc_100_12_256": Work("densenet_bc_100_12", 256, dtype="bfloat16"),
    "vovnet39_128": Work("vovnet39", 128, dtype="bfloat16", fields=TIMM),
    "densenet201_64": Work("densenet201", 64, dtype="bfloat16"),
}
TINY = {"tiny_4": Work("densenet_bc_40_12", 4, dtype="bfloat16", fields={"depth": 10})}


def seconds(function, *arguments, tries: int = 7, calls: int = 5) -> list[float]:
    """Seconds of a call, in several tries, after two calls that are not timed."""
    result = function(*arguments), function(*arguments)
    found = []
    for _ in range(tries):
        jax.block_until_ready(result)
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)
        found.append((time.perf_counter() - start) / calls)
    return found


def device(options: argparse.Namespace) -> dict[str, Any]:
    """What the card does at best, and how exact its float32 products are by default."""
    size = 2**12 if options.rehearse else 2**31
    x = jax.random.normal(jax.random.key(0), (size,), jnp.bfloat16)
    copying = seconds(jax.jit(lambda x: x * 2), x)
    n = 256 if options.rehearse else 8192
    a, b = jax.random.normal(jax.random.key(1), (2, n, n), jnp.bfloat16)
    product = seconds(jax.jit(jnp.matmul), a, b)
    a, b = np.random.default_rng(0).normal(size=(2, 1024, 1024)).astype(np.float32)
    exact, errors = a.astype(np.float64) @ b, {}
    for precision in ("default", "high", "highest"):
        with jax.default_matmul_precision(precision):
            errors[precision] = distance(jnp.matmul(a, b), exact)
    return {
        "copy_bytes_per_second": 2 * x.nbytes / statistics.median(copying),
        "copy_seconds": copying,
        "bfloat16_flops_per_second": 2 * n**3 / statistics.median(product),
        "product_seconds": product,
        "float32_product_error": errors,
    }


def distance(found: Any, exact: Any) -> float:
    """|found - exact| / |exact| of two arrays or trees of arrays, in float64."""
    found, exact = (
        np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])
        for tree in (found, exact)
    )
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def forms(options: argparse.Namespace) -> dict[str, Any]:
    """Distances of both forms' gradients from the concatenated form's in float64."""
    jax.config.update("jax_enable_x64", True)
    fields = {"depth": 10 if options.rehearse else 22}
    _, variables = densejax.create("densenet_bc_40_12", 10, **fields)
    described = models.fields("densenet_bc_40_12", **fields)
    random = np.random.default_rng(0)
    images, labels = random.normal(size=(32, 32, 32, 3)), random.integers(0, 10, 32)

    def gradient(block, dtype, precision):
        model = models.create({**described, "block": block}, 10, jnp.dtype(dtype))
        wide = np.float64 if dtype == "float64" else np.float32
        given = jax.tree.map(lambda leaf: leaf.astype(wide), variables)

        def loss(params):
            (logits, _), _ = model.apply(
                given | {"params": params}, images.astype(dtype), True, mutable=["batch_stats"]
            )
            return -jax.nn.log_softmax(logits)[jnp.arange(32), labels].mean()

        with jax.default_matmul_precision(precision):
            return jax.device_get(jax.jit(jax.grad(loss))(given["params"]))

    exact, found = gradient("concat", "float64", "highest"), {}
    # In float32 rounding may open a ReLU, which moves the gradient by some thousandths.
    room = {("float64", "highest"): 1e-9, ("float32", "highest"): 0.01}
    room |= {("float32", "default"): 0.01, ("bfloat16", "default"): 0.01}
    for dtype, precision in room:
        for block in ("concat", "in_place"):
            error = distance(gradient(block, dtype, precision), exact)
            found[f"{block}, {dtype}, {precision}"] = error
    good = all(
        found[f"in_place, {dtype}, {precision}"]
        < 2 * found[f"concat, {dtype}, {precision}"] + room[dtype, precision]
        for dtype, precision in room
    )
    return {"errors": found, "good": good}


def resume(options: argparse.Namespace) -> dict[str, Any]:
    """Whether a killed run of the digits card goes on as if it had not been killed."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    flags = ("--config.checkpoint.every_epochs=1", "--config.log.every_steps=1")
    layout = (1, 1, "float32", "shard_map", *flags)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = pathlib.Path(folder, "whole"), pathlib.Path(folder, "killed")
        platform = jax.default_backend().replace("gpu", "cuda")
        layouts.finish(whole, layouts.start(whole, *layout, platform=platform))
        (process,) = layouts.start(killed, *layout, platform=platform)
        while not (killed / "checkpoints/22").exists() and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is not None:
            raise RuntimeError(f"{killed} ended before it could be killed; output0 in it says why")
        process.kill()
        process.wait()
        layouts.finish(killed, layouts.start(killed, *layout, platform=platform))
        expected, found = layouts.state(whole), layouts.state(killed)
    return {"leaves": len(expected), "good": found == expected}


def parity(options: argparse.Namespace) -> dict[str, Any]:
    """Distances of our float32 logits, in full precision, from PyTorch's on the CPU."""
    import parity_torch
    import torch

    names = ("resnet18",) if options.rehearse else ("densenet121", "resnet50", "timm/vovnet39a")
    images, found = np.random.default_rng(0).normal(size=(8, 96, 96, 3)).astype(np.float32), {}
    for name in names:
        peer, model = parity_torch.build(name, np.float32)
        with torch.no_grad():
            expected = peer.eval()(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
        variables = pretrained.from_torch(model, parity_torch.arrays(peer.state_dict()))
        with jax.default_matmul_precision("highest"):
            found[name] = distance(jax.jit(model.apply)(variables, images)[0], expected)
    return {"errors": found, "good": max(found.values()) < 1e-4}


def speed(work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a network's steps, training and inference, in all implementations in turn."""
    names, rows = ["densejax", *PEERS[: 1 if options.rehearse else None]], {}
    turns = (2, 1) if options.rehearse else (7, 10)  # and steps of each

    def start(mode):
        with tempfile.TemporaryDirectory() as directory:
            spec = compare.specification(work, mode, directory)
            return compare.start(names, spec, sys.executable, at_once=len(names))

    with concurrent.futures.ThreadPoolExecutor() as pool:  # all compile at the same time
        started = dict(zip(MODES, pool.map(start, MODES), strict=True))
    for mode, children in started.items():
        checks = {name: child.facts.pop("check") for name, child in children.items()}
        compare.check(checks, limit=0.1)  # bfloat16: other networks are further away
        answers = alternate(children, *turns)
        for name, child in children.items():
            found = compare.row(name, child.facts, answers[name], work.batch_size)
            rows[f"{mode}, {name}"] = found | {"first_step": checks[name]}
    for child in itertools.chain(*(children.values() for children in started.values())):
        child.close()
    floor = roofline.training(work.network(), work.image_shape, work.batch_size, work.dtype)
    return {"rows": rows, "floor_bytes": floor.bytes, "floor_flops": floor.flops}


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Temporary bytes of a training step of DenseNet-BC by its depth."""
    asked = argparse.Namespace(
        output=options.output / "memory_by_depth.json",
        target="here",
        depths=[10, 16] if options.rehearse else [40, 70, 100, 160],
        implementations="in_place,in_place:layer,concat",
        batch_size=2 if options.rehearse else 64,
        dtype="bfloat16",
    )
    rows = memory_by_depth.measure(asked)
    return {"rows": rows, "text": memory_by_depth.text(rows, "DenseNet-BC, k = 12, bfloat16")}


def fashion(options: argparse.Namespace) -> dict[str, Any]:
    """The run of configs/fashion_mnist.py; a skip that says so where its images are not there."""
    images = pathlib.Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
    if options.rehearse or not images.is_dir():
        return {"skipped": f"no Fashion-MNIST in {images}; FASHION_MNIST=FOLDER names another"}
    run = options.output / "fashion_run"
    command = [sys.executable, "-m", "densejax.main", "--config=configs/fashion_mnist.py"]
    command += [f"--config.data.manual_dir={images}", f"--workdir={run}"]
    subprocess.run(command, check=True, cwd=ROOT)
    return json.loads((run / "summary.json").read_text())


def parts(rehearse: bool) -> dict[str, Any]:
    """All parts in the order of importance."""
    works = TINY if rehearse else SPEED
    measured = {name: functools.partial(speed, work) for name, work in works.items()}
    first = {"device": device, "forms": forms, "pretrained": parity, "resume": resume}
    return first | measured | {"memory": memory, "fashion": fashion}


def surroundings() -> dict[str, Any]:
    """What the measured numbers depend on: card, versions, code and date."""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        card = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        card = ""
    versions = {}
    for name in ("jax", "jaxlib", "flax", "torch", "torchvision", "timm"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "card_and_driver": card or jax.devices()[0].device_kind,
        "versions": versions,
        "code": workdir.code_digest(),
        "date": datetime.date.today().isoformat(),
    }


def run_part(name: str, options: argparse.Namespace) -> None:
    """Starts the process of a part and ends it, with all that it started, at its time limit."""
    command = [sys.executable, __file__, f"--output={options.output}", f"--part={name}"]
    command += ["--rehearse"] if options.rehearse else []
    start = time.perf_counter()
    with open(options.output / f"{name}.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(timeout=options.limit)
        except subprocess.TimeoutExpired:
            code = f"its limit of {options.limit} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    took = f"{time.perf_counter() - start:.0f} s"
    print(f"{name}: {took}" if code == 0 else f"{name}: FAILED after {took}: {code}", flush=True)


def table(results: dict[str, Any]) -> str:
    """The results that are there, as text for people."""
    first = next(iter(results.values()), None)
    if first is None:
        return "nothing was measured"
    lines = [f"{first['card_and_driver']}; {first['versions']}; {first['date']}", ""]
    bandwidth = results.get("device", {}).get("copy_bytes_per_second")
    for name, found in results.items():
        if "floor_bytes" not in found:
            kept = {key: value for key, value in found.items() if key not in EVERYWHERE}
            lines.append(found.get("text") or f"{name}: {json.dumps(kept)}")
    cells = [("", "implementation", "images/s", "ms/step", "n", "spread ms", "/ ours", "moved GiB",
              "floor %", "peak GiB", "compile s")]  # fmt: skip
    for name, found in results.items():
        ours = {}
        for key, row in found.get("rows", {}).items() if "floor_bytes" in found else ():
            mode, _, implementation = key.partition(", ")
            step = row["seconds_per_step"]
            ours.setdefault(mode, step)  # the first row
            share = "-"
            if mode == "train" and bandwidth:
                share = f"{100 * found['floor_bytes'] / bandwidth / step:.0f}"
            tries = [1e3 * number for number in row["tries"]]
            moved, peak = row.get("moved_bytes"), row.get("peak_device_bytes")
            cells.append(
                (
                    f"{name} {mode}",
                    implementation.partition(":")[0],
                    f"{row['images_per_second']:,.0f}",
                    f"{1e3 * step:.2f}",
                    str(len(tries)),
                    f"{min(tries):.2f} to {max(tries):.2f}",
                    f"{step / ours[mode]:.2f}",
                    f"{moved / 2**30:.1f}" if moved else "-",
                    share,
                    f"{peak / 2**30:.1f}" if peak else "-",
                    f"{row['compile_seconds'] or 0:.0f}",
                )
            )
    return "\n".join([*lines, "", formats.table(cells, right=9)])


def main() -> int:
    """Runs the parts that are not there yet; returns 1 where one failed."""
    parser = script.Parser(__doc__)
    parser.add_argument("--output", type=script.path, required=True, help="folder of the results")
    parser.add_argument("--parts", default="", help="with commas between them; default: all")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # of the process that runs one
    parser.add_argument("--limit", type=script.positive, default=590, help="seconds of a part")
    parser.add_argument("--rehearse", action="store_true", help="tiny networks, on any device")
    options = parser.parse_args()
    known = parts(options.rehearse)
    options.output = pathlib.Path(options.output).absolute()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.part:
        start = time.perf_counter()
        found = known[options.part](options) | surroundings()
        found["seconds"] = time.perf_counter() - start
        text = json.dumps(found, indent=1) + "\n"
        (options.output / f"{options.part}.json").write_text(text)
        return 0
    wanted = options.parts.split(",") if options.parts else list(known)
    if unknown := set(wanted) - set(known):
        raise UserError(f"--parts: {', '.join(unknown)} unknown; allowed are {', '.join(known)}")
    if not options.rehearse and jax.default_backend() != "gpu":
        raise UserError("there is no GPU: JAX sees none (make cuda); --rehearse does without")
    for name in wanted:
        if not (options.output / f"{name}.json").exists():
            run_part(name, options)
    files = [options.output / f"{name}.json" for name in known]
    results = {file.stem: json.loads(file.read_text()) for file in files if file.exists()}
    print(table(results))
    (options.output / "table.md").write_text(f"```\n{table(results)}\n```\n")
    bad = [n for n in wanted if n not in results or results[n].get("good") is False]
    return int(bool(bad))


if __name__ == "__main__":
    script.run(main)
