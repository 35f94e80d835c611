"""`initialize` and `resume` in torch.distributed jobs: gloo on the CPU, real processes."""

import copy
import gc
import importlib.util
import multiprocessing
import os
import traceback
import warnings
import weakref
from collections.abc import Callable
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lora_init
from lora_init import LoraInitError
from lora_init.distributed import Ranks, ranks
from lora_init.integrations.peft import sharded
from lora_init.methods.pissa import Pissa

# A server that has imported all this once, and of which every rank is a fork.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lora_init.integrations.peft", __name__])
DIED = "died"
TOKENS = torch.arange(64).reshape(4, 16)
METHODS = {
    "inilora": {"steps": 8},
    "krylov": {"solver": "krylov"},
    "pissa": {},
    "lora": {},
}


def run(
    size: int, function: Callable[..., Any], *args: Any, folder: Path, wait: float = 120
) -> list[Any]:
    """function(*args) on every rank of a job: what it returned, or `DIED`."""
    folder.mkdir(parents=True)
    processes = [
        CONTEXT.Process(target=_rank, args=(rank, size, folder, function, args))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(wait)
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not hung, f"ranks {hung} still run after {wait} s"
    files = [folder / f"{rank}.pt" for rank in range(size)]
    results = [torch.load(f, weights_only=False) if f.exists() else DIED for f in files]
    failures = [result for result in results if isinstance(result, Traceback)]
    assert not failures, "\n".join(failures)
    return results


class Traceback(str):
    """Of what a rank raised."""


def _rank(
    rank: int, size: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    try:
        result = function(*args)
    except Exception:
        result = Traceback(traceback.format_exc())
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()


def adapted(seed: int = 0, **config: Any) -> PeftModel:
    """Shapes that no number of ranks divides; k and v are (10, 40), and one rank is below 3."""
    return get_peft_model(base_model(seed), LoraConfig(**lora_options(**config)))


def base_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=101,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


def lora_options(**config: Any) -> dict[str, Any]:
    return {
        "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"layers.0.self_attn.k_proj": 2},
    } | config


def shard(model: PeftModel) -> PeftModel:
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def initialize(model: PeftModel, method: str, **more: Any) -> lora_init.report.Report:
    name = "inilora" if method == "krylov" else method
    return lora_init.initialize(model, name, cache=False, **METHODS[method], **more)


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in model.state_dict().items()
    }


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.shape == other[name].shape, name
        bits = (t.contiguous().view(torch.uint8) for t in (tensor, other[name]))
        assert torch.equal(*bits), name  # NaN equals NaN


def losses(report: lora_init.report.Report) -> dict[str, float]:
    return {layer.name: layer.loss for layer in report.layers}


def alone(method: str, **config: Any) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    model = adapted(**config)
    report = initialize(model, method)
    return whole_state(model), losses(report)


# -- ranks ---------------------------------------------------------------------------------------


def test_owners_share_by_cost_whoever_asks():
    costs = [5, 1, 1, 9, 3, 3, 2]
    owners = Ranks(0, 3).owners(costs)
    assert owners == Ranks(2, 3).owners(costs)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(3)]
    assert loads == [9, 8, 7]
    assert Ranks().owners(costs) == [0] * len(costs)
    assert Ranks(0, 4).owners([]) == []


def test_one_process_exchanges_with_itself():
    alone = Ranks()
    value = object()
    assert alone.gather(value) == [value]
    assert alone.together(lambda: 3) == 3
    alone.agree({"what": "one"}, "")
    with pytest.raises(ZeroDivisionError):
        alone.together(lambda: 1 / 0)
    with ranks() as job:
        assert job == alone


def exchanges() -> dict[str, Any]:
    with ranks(False) as job:
        assert job.size == 1
    with ranks() as job:
        tensor = torch.full((3,), float(job.rank))
        job.broadcast(tensor, 1)

        def fails() -> None:
            if job.rank == 2:
                raise KeyError("the third")

        def attempt(function: Callable[[], object]) -> str:
            try:
                return str(function())
            except Exception as error:
                return f"{type(error).__name__}: {error}"

        return {
            "gather": job.gather(job.rank * 10),
            "broadcast": tensor,
            "together": attempt(lambda: job.together(fails)),
            "same": attempt(lambda: job.agree({"a": "1"}, "")),
            "differs": attempt(lambda: job.agree({"a": "1", "b": f"{job.rank // 2}"}, "do")),
            "missing": attempt(lambda: job.agree({"c": "1"} if job.rank else {}, "do")),
        }


def test_ranks_exchange_and_fail_together(tmp_path):
    results = run(3, exchanges, folder=tmp_path / "job")
    for rank, result in enumerate(results):
        assert result["gather"] == [0, 10, 20]
        assert torch.equal(result["broadcast"], torch.ones(3))
        own = "KeyError: 'the third'" if rank == 2 else "LoraInitError: rank 2: 'the third'"
        assert result["together"] == own
        assert result["same"] == "None"
        assert result["differs"] == "LoraInitError: b is 0 on rank 0 and 1 on rank 2: do"
        assert result["missing"] == "LoraInitError: c is missing on rank 0 and 1 on rank 1: do"


# -- the same bits -------------------------------------------------------------------------------


def plain_and_sharded() -> dict[str, Any]:
    found = {}
    for method in METHODS:
        model = adapted()
        found[method, "plain"] = losses(initialize(model, method)), whole_state(model)
        model = shard(adapted())
        found[method, "fsdp2"] = losses(initialize(model, method)), whole_state(model)
    return found


def test_a_failure_keeps_no_group_alive():
    """Threads of one that lives until the interpreter ends can abort the process."""

    class Group:
        pass

    def fail():
        raise LoraInitError("a.q: no")

    group = Group()
    alive = weakref.ref(group)
    gc.disable()
    try:
        with suppress(LoraInitError):
            Ranks(group=group).together(fail)
        del group
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_ranks_gives_the_bits_of_one_process(tmp_path, size):
    results = run(size, plain_and_sharded, folder=tmp_path / "job")
    for method in METHODS:
        state, loss = alone(method)
        for result in results:
            for form in ("plain", "fsdp2"):
                assert result[method, form][0] == loss, (method, form)
                assert_same(result[method, form][1], state)


def sharded_in_other_ways() -> dict[str, Any]:
    found = {}
    base = base_model()
    for layer in base.model.layers:
        fully_shard(layer)
    model = get_peft_model(fully_shard(base), LoraConfig(**lora_options()))
    assert isinstance(model.base_model.model.lm_head.weight, DTensor)
    initialize(model, "inilora")
    found["base before PEFT"] = whole_state(model)

    model = adapted()
    initialize(model, "inilora")
    found["after initialize"] = whole_state(shard(model))

    model = fully_shard(adapted())
    with torch.no_grad():
        model(TOKENS)
    # FSDP2 keeps the parameters of the root gathered: what is written into those is lost.
    assert not isinstance(model.base_model.model.lm_head.weight, DTensor)
    report = initialize(model, "inilora", example={"input_ids": TOKENS + dist.get_rank()})
    found["after a forward pass"] = whole_state(model)
    assert report.output_drift < 1e-5

    found["drift"] = report.output_drift

    assert_same(whole_state(gpt2(shard=True)), whole_state(gpt2(shard=False)))
    return found


def gpt2(shard: bool) -> PeftModel:
    """Transposed weights in bf16 with fp32 factors, sharded or solved by each rank alone."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=20, n_layer=1, n_head=2, vocab_size=50, n_positions=16)
    base = GPT2LMHeadModel(config).to(torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True))
    if shard:
        model = fully_shard(model)
    lora_init.initialize(model, "pissa", distributed=shard)
    return model


def cached(directory: Path) -> list[set[bool]]:
    reports = [lora_init.initialize(adapted(), steps=8, cache=directory) for _ in range(2)]
    return [{layer.info["cached"] for layer in report.layers} for report in reports]


def test_ranks_share_the_cache(tmp_path):
    for found in run(2, cached, tmp_path / "cache", folder=tmp_path / "job"):
        assert found == [{False}, {True}]


def test_however_it_was_sharded(tmp_path):
    state, _ = alone("inilora")
    results = run(2, sharded_in_other_ways, folder=tmp_path / "job")
    assert results[0].pop("drift") == results[1].pop("drift")  # the largest of both
    for result in results:
        for form, found in result.items():
            print(form)
            assert_same(found, state)


# -- training, saving, resuming ------------------------------------------------------------------


def train(model: nn.Module, wrapped: nn.Module, steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    part = TOKENS[dist.get_rank() :: 2]
    for _ in range(steps):
        wrapped(input_ids=part, labels=part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


def assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def ddp_training(out: Path) -> dict[str, torch.Tensor]:
    model = adapted(modules_to_save=["lm_head"])
    initialize(model, "inilora")
    train(model, DistributedDataParallel(model))
    if dist.get_rank() == 0:
        model.save_pretrained(out / "checkpoint")
        lora_init.save_adapter(model, out / "adapter")
    else:
        model.save_pretrained(out / "checkpoint", is_main_process=False)
    dist.barrier()
    return whole_state(model) | {"logits": logits(model), **resumed(out / "checkpoint")}


def resumed(checkpoint: Path, form: Callable = lambda model: model) -> dict[str, torch.Tensor]:
    """The logits of a new model that resumes, and of one that is initialised again and loads."""
    new = form(adapted(modules_to_save=["lm_head"]))
    lora_init.resume(new, checkpoint)
    same = form(adapted(modules_to_save=["lm_head"]))
    initialize(same, "inilora")
    same.load_adapter(checkpoint, "default")
    return {"resumed": logits(new), "loaded": logits(same)}


def assert_adapter_fits(result: dict[str, torch.Tensor], directory: Path) -> None:
    live = result["logits"]
    assert (live - logits(base_model())).abs().max() > 0.05 * live.abs().max()  # it learned
    assert_close(logits(PeftModel.from_pretrained(base_model(), directory)), live)


def test_ddp_trains_saves_and_resumes(tmp_path):
    one, other = run(2, ddp_training, tmp_path, folder=tmp_path / "job")
    assert_same(one, other)
    assert_adapter_fits(one, tmp_path / "adapter")
    assert_adapter_fits(one, tmp_path / "checkpoint")
    assert torch.equal(one["resumed"], one["logits"])
    assert torch.equal(one["loaded"], one["logits"])


def trainer_run(out: Path) -> dict[str, Any]:
    """Trainer finds the job in these variables, as torchrun sets them."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    from transformers import Trainer, TrainingArguments

    def trainer(steps: int) -> Trainer:
        arguments = TrainingArguments(
            str(out),
            max_steps=steps,
            per_device_train_batch_size=1,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=True,  # not the last
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        model = adapted()
        initialize(model, "inilora")
        rows = [{"input_ids": row, "labels": row} for row in TOKENS]
        return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)

    run = trainer(4)
    run.train()
    assert isinstance(run.model_wrapped, DistributedDataParallel)
    best = {"best": logits(run.model.eval()), "best path": Path(run.state.best_model_checkpoint)}
    again = trainer(4)
    again.train(resume_from_checkpoint=str(out / "checkpoint-2"))

    def curve(run: Trainer) -> list[float]:
        return [entry["loss"] for entry in run.state.log_history if "loss" in entry]

    return best | {"losses": curve(run), "resumed losses": curve(again)}


def test_trainer_under_ddp(tmp_path):
    one, other = run(2, trainer_run, tmp_path / "out", folder=tmp_path / "job")
    assert torch.equal(one["best"], other["best"])
    assert one["best path"].name == "checkpoint-2"
    stock = PeftModel.from_pretrained(base_model(), one["best path"])
    assert_close(logits(stock), one["best"])
    assert len(one["losses"]) == 4
    assert one["resumed losses"] == pytest.approx(one["losses"], rel=1e-6)


def fsdp2_training(out: Path) -> dict[str, Any]:
    model = shard(adapted(modules_to_save=["lm_head"]))
    initialize(model, "inilora")
    train(model, model)
    found: dict[str, Any] = {}
    for name, save in {
        "save_pretrained": lambda: model.save_pretrained(out / "refused"),
        "save_adapter": lambda: lora_init.save_adapter(model, out / "refused"),
    }.items():
        with pytest.raises(LoraInitError, match="sharded over ranks") as refused:
            save()
        found[name] = str(refused.value)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    main = dist.get_rank() == 0
    assert bool(state) == main
    model.save_pretrained(out / "checkpoint", is_main_process=main, state_dict=state)
    if main:
        lora_init.save_adapter(model, out / "adapter", state_dict=state)
        with pytest.raises(LoraInitError, match=r"lora_A.default.weight is missing"):
            model.save_pretrained(out / "refused", state_dict={})
    dist.barrier()
    found |= {"logits": logits(model), **resumed(out / "checkpoint", shard)}
    train(model, model, steps=1)
    logits(model)  # leaves parameters gathered, into which nothing must be loaded
    model.load_adapter(out / "checkpoint", "default")
    return found | {"loaded again": logits(model)}


def test_fsdp2_trains_saves_and_resumes(tmp_path):
    one, other = run(2, fsdp2_training, tmp_path, folder=tmp_path / "job")
    assert torch.equal(one["logits"], other["logits"])
    assert_adapter_fits(one, tmp_path / "adapter")
    assert_adapter_fits(one, tmp_path / "checkpoint")
    assert torch.equal(one["resumed"], one["logits"])
    assert torch.equal(one["loaded"], one["logits"])
    assert torch.equal(one["loaded again"], one["logits"])
    assert not list((tmp_path / "refused").glob("*"))


# -- errors --------------------------------------------------------------------------------------


@contextmanager
def refused(model: nn.Module, found: list[str]) -> Any:
    """Notes the error; the model must be as it was."""
    before = whole_state(model)
    try:
        yield
    except LoraInitError as error:
        found.append(str(error))
    else:
        raise AssertionError("nothing was raised")
    assert_same(whole_state(model), before)


def different_ranks() -> list[str]:
    rank = dist.get_rank()
    found: list[str] = []
    for config, method, more in (
        ({"r": 4 + rank}, "inilora", {}),
        ({"target_modules": ["q_proj", "k_proj"][: rank + 1]}, "inilora", {}),
        ({"seed": rank}, "inilora", {}),
        ({}, "inilora", {"seed": rank}),
        ({}, ["pissa", "inilora"][rank], {}),
        ({}, "inilora", {"adapter_name": ["default", "other"][rank]}),
    ):
        model = adapted(**config)
        with refused(model, found):
            initialize(model, method, **more)
    model = adapted(seed=rank)
    initialize(model, "inilora", distributed=False)
    if rank == 1:
        other = adapted(seed=1)
        initialize(other, "inilora", distributed=False)
        assert_same(whole_state(model), whole_state(other))
    wrapped = DistributedDataParallel(adapted())
    with refused(wrapped, found):
        initialize(wrapped, "inilora")
    return found


def test_ranks_that_differ_are_refused_together(tmp_path):
    one, other = run(2, different_ranks, folder=tmp_path / "job")
    first = "model.layers.0.self_attn."
    for messages, own in ((one, False), (other, True)):
        starts = [
            f"{first}q_proj is (40, 40) torch.float32 on cpu, r 4, scaling 2.0, factors in "
            f"torch.float32 on rank 0 and (40, 40) torch.float32 on cpu, r 5, scaling 1.6,",
            f"{first}k_proj is missing on rank 0 and (10, 40)",
            f"the checksum of {first}q_proj's base weight is ",
            "the seed is 0 on rank 0 and 1 on rank 1: call it with the same arguments",
            "the method is pissa on rank 0 and inilora on rank 1",
            f"{'' if own else 'rank 1: '}no adapter 'other'",
            "a peft.PeftModel is needed, got DistributedDataParallel",
        ]
        assert len(messages) == len(starts)
        for message, start in zip(messages, starts, strict=True):
            assert message.startswith(start), message
        assert all("distributed=False" in message for message in messages[:5])


def bad_layers() -> list[str]:
    found: list[str] = []
    for form in (lambda model: model, shard):
        model = adapted()
        weight = model.base_model.model.model.layers[1].self_attn.q_proj.base_layer.weight
        weight.data[3, 5] = torch.nan
        model = form(model)
        with refused(model, found):
            initialize(model, "inilora")
        # the last check before anything is written
        model = adapted(target_modules=["q_proj"])
        model.base_model.model.model.layers[1].self_attn.q_proj.base_layer.weight.data.mul_(1e5)
        model = form(model.to(torch.float16))
        with refused(model, found):
            initialize(model, "inilora")
        model = form(adapted())
        with refused(model, found):
            lora_init.initialize(model, Fails())
    tied = adapted(target_modules=["q_proj", "lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tied.base_model.model.model.embed_tokens.weight = (
            tied.base_model.model.lm_head.base_layer.weight
        )
        tied = fully_shard(tied)
    with refused(tied, found):
        initialize(tied, "inilora")
    model = shard(adapted())
    with refused(model, found):
        initialize(model, "inilora", distributed=False)
    return found


def test_a_layer_that_one_rank_cannot_solve_fails_on_all(tmp_path):
    sizes = [p.base_layer.weight.numel() for p in lora_modules(adapted())]
    names = [p for p, m in adapted().named_modules() if hasattr(m, "base_layer")]
    owner = Ranks(0, 2).owners(sizes)[
        names.index("base_model.model.model.layers.1.self_attn.q_proj")
    ]
    results = run(2, bad_layers, folder=tmp_path / "job")
    for rank, messages in enumerate(results):
        prefix = "" if rank == owner else f"rank {owner}: "
        name = "model.layers.1.self_attn.q_proj"
        for i in (0, 3):
            assert messages[i].startswith(f"{prefix}{name}: 1 of 1600 weights are NaN"), messages[i]
            assert "the residual W − s·B·A overflows torch.float16" in messages[i + 1]
            own = "this share cannot be solved"
            assert messages[i + 2] == (own if rank == 1 else f"rank 1: {own}")
        assert "lm_head: its weight is shared with" in messages[6]
        assert messages[7].startswith("distributed=False, but the parameters of this model are")


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if ".lora_" in name]


def lora_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "base_layer")]


class Fails(Pissa):
    """On rank 1, in the middle of its share."""

    def solve(self, *args: Any) -> Any:
        if dist.get_rank() == 1:
            self.fail()
        return super().solve(*args)

    def fail(self) -> None:
        raise LoraInitError("this share cannot be solved")


class Dies(Fails):
    def fail(self) -> None:
        os._exit(9)


def killed(form: Callable[[PeftModel], PeftModel]) -> str:
    model = form(adapted())
    before = {name: t.clone() for name, t in local_state(model).items()}
    try:
        lora_init.initialize(model, Dies())
    except LoraInitError as error:
        assert_same(local_state(model), before)
        return str(error)
    return "nothing was raised"


def local_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: sharded.here(t) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("form", [copy.copy, shard], ids=["plain", "fsdp2"])
def test_a_rank_that_dies_is_an_error_on_the_others(tmp_path, form):
    one, other = run(2, killed, form, folder=tmp_path / "job", wait=40)
    assert other == DIED
    assert one.startswith("another process of this job is gone or does not answer"), one


# -- DeepSpeed ZeRO-3 ----------------------------------------------------------------------------


class Partitions:
    """A model's parameters and `gather_params_ctx` as under ZeRO-3: the values are there inside
    only, and what is written stays with a modifier only.
    """

    def __init__(self, model: nn.Module):
        self.kept = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            p.ds_id, p.ds_shape = name, p.shape
            p.data = torch.empty(0)

    @contextmanager
    def __call__(self, parameters: list[nn.Parameter], modifier_rank: int | None = 0) -> Any:
        for p in parameters:
            assert not p.numel(), "gathered twice"
            p.data = self.kept[p.ds_id].clone()
        yield
        for p in parameters:
            if modifier_rank == 0:
                self.kept[p.ds_id] = p.data.clone()
            p.data.copy_(torch.nan)  # freed
            p.data = torch.empty(0)


@pytest.mark.parametrize("method", METHODS)
def test_zero3_parameters_are_read_and_written_gathered_only(monkeypatch, method):
    state, loss = alone(method)
    model = adapted()
    partitions = Partitions(model)
    monkeypatch.setattr(sharded, "gather_params_ctx", partitions)
    assert losses(initialize(model, method)) == loss
    assert all(not p.numel() for p in model.parameters())
    assert_same(partitions.kept, {name: state[name] for name in partitions.kept})


def test_zero3_loads_and_resumes_gathered_only(tmp_path, monkeypatch):
    trained = adapted()
    initialize(trained, "inilora")
    for p in lora_parameters(trained):
        p.data.add_(0.01)
    trained.save_pretrained(tmp_path)
    model = adapted()
    partitions = Partitions(model)
    monkeypatch.setattr(sharded, "gather_params_ctx", partitions)
    lora_init.resume(model, tmp_path)
    expected = {name: p.detach() for name, p in trained.named_parameters()}
    assert_same(partitions.kept, expected)
    for name, tensor in partitions.kept.items():
        if ".lora_" in name:
            tensor.zero_()
    model.load_adapter(tmp_path, "default")
    assert_same(partitions.kept, expected)


def test_tied_zero3_parameters_are_refused():
    model = adapted(target_modules=["q_proj", "lm_head"])
    inner = model.base_model.model
    inner.model.embed_tokens.weight = inner.lm_head.base_layer.weight
    Partitions(model)  # two names of one parameter that has no memory
    with pytest.raises(LoraInitError, match=r"lm_head: its weight is shared with .*embed_tokens"):
        initialize(model, "inilora")


def test_zero3_that_peft_does_not_know_of_is_refused():
    model = adapted()
    Partitions(model)
    with pytest.raises(LoraInitError, match=r"shape \(40, 40\) is partitioned.*HfDeepSpeedConfig"):
        initialize(model, "inilora")


def zero3_job(out: Path) -> dict[str, Any]:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(dist.get_rank())}
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.init_distributed("gloo", dist_init_required=False)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    known = HfDeepSpeedConfig(config)

    def partitioned(model: PeftModel) -> PeftModel:
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
        assert all(p.numel() == 0 for p in model.parameters())
        return model

    def state(model: nn.Module) -> dict[str, torch.Tensor]:
        assert all(p.numel() == 0 for p in model.parameters())
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return whole_state(model)

    found = {}
    for method in METHODS:
        model = partitioned(adapted())
        report = initialize(model, method)
        found[method] = losses(report), state(model)
    model = partitioned(adapted(modules_to_save=["lm_head"]))
    initialize(model, "inilora")
    with pytest.raises(LoraInitError, match="sharded over ranks"):
        model.save_pretrained(out)
    with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
        for p in model.parameters():
            if p.requires_grad:
                p.data.add_(0.01)
    trained = state(model)
    main = dist.get_rank() == 0
    model.save_pretrained(out, is_main_process=main, state_dict=trained if main else {})
    dist.barrier()
    new = partitioned(adapted(modules_to_save=["lm_head"]))
    lora_init.resume(new, out)
    found["trained"], found["resumed"] = trained, state(new)

    del known  # transformers, and so PEFT, know of ZeRO-3 by this object being alive
    model = partitioned(adapted())
    try:
        initialize(model, "inilora")
    except LoraInitError as error:
        found["unknown"] = str(error)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs deepspeed")
def test_deepspeed_zero3(tmp_path):
    """Slow: DeepSpeed compiles an extension for the CPU first."""
    for result in run(2, zero3_job, tmp_path / "out", folder=tmp_path / "job"):
        for method in METHODS:
            state, loss = alone(method)
            assert result[method][0] == loss
            assert_same(result[method][1], state)
        assert_same(result["resumed"], result["trained"])
        assert "HfDeepSpeedConfig" in result["unknown"]
