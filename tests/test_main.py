"""The central promise, that no gradient depends on the layout; and the other parts of main.py."""

import json
import math
from typing import NamedTuple

import pytest
import reference
import torch
from conftest import ROOT, open_data, read_metrics, relative_error
from ranks import run_ranks
from torch.distributed.fsdp import FSDPModule, fully_shard

import main
from checkpoint.weights import init_weights
from configuration_llama import LlamaConfig
from data import IGNORED_LABEL
from modeling_llama import LlamaForCausalLM

SEQLEN, BATCH_SIZE = 101, 4  # an odd length: chunks and cp ranks do not divide it, so it is padded
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)]  # (dp, cp)


class Variant(NamedTuple):
    tied: bool = True  # embedding and head
    is_causal: bool = True
    ignored_from_row: int | None = None  # labels of these rows do not count


TIED = Variant()
VARIANTS = {
    "tied": TIED,
    "untied": Variant(tied=False),
    "full mask": Variant(is_causal=False),
    "tied, the second of two dp ranks without labels": Variant(ignored_from_row=2),
    "untied, the second of two dp ranks without labels": Variant(tied=False, ignored_from_row=2),
}


ACCUMULATION = [(1, name) for name in VARIANTS] + [
    (2, "tied"),
    (2, "untied, the second of two dp ranks without labels"),
]


class WholeDocuments(NamedTuple):
    """Documents that need no cut: 30 and 71 tokens are as much work as 71 and 30."""

    variant: Variant
    batch_size: int
    lengths: list[list[int]]  # of the documents in each micro-batch of a dp rank


WHOLE = {  # by (dp, cp)
    (2, 2): WholeDocuments(Variant(ignored_from_row=5), 8, [[30, 71, 71, 30], [202]]),
    (1, 4): WholeDocuments(
        Variant(tied=False, is_causal=False), 4, [[30, 71, 71, 30, 30, 71, 71, 30]]
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents of uneven lengths, some of one token (an empty file), some longer than a row."""
    path = tmp_path_factory.mktemp("documents")
    generator = torch.Generator().manual_seed(0)
    for i, size in enumerate([0, 0, 1, 2, 5, 13, 37, 100, 101, 160, 333]):
        text = torch.randint(32, 127, (size,), generator=generator, dtype=torch.uint8)
        (path / f"{i:02}.txt").write_bytes(bytes(text))
    return str(path)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Other documents to evaluate on: one of them fills rows, and labels are ignored."""
    path = tmp_path_factory.mktemp("held_out")
    for i, size in enumerate([0, 3, 1100, 17, 101]):
        (path / f"{i}.txt").write_text("evaluation"[i:] * (size // 5))
    return str(path)


def shape(variant: Variant = TIED) -> dict:
    """Fields that replace the preset's. Larger weights than usual: attention far from uniform."""
    return {
        "num_hidden_layers": 3,
        "initializer_range": 0.1,
        "tie_word_embeddings": variant.tied,
        "is_causal": variant.is_causal,
    }


def overrides(folder, cp=1, accumulation=1, variant=TIED) -> list[str]:
    return [
        "model_config.preset=tiny",
        f"model_config.overrides={json.dumps(shape(variant))}",
        f"data_config.source={folder}",
        f"data_config.seqlen={SEQLEN}",
        f"data_config.batch_size={BATCH_SIZE}",
        "train_config.dtype=float32",
        "train_config.compile=false",
        f"train_config.gradient_accumulation_steps={accumulation}",
        f"parallel_config.context_parallel_size={cp}",
        f"train_config.output_dir={folder}/../run",  # the default's lock is another test's
    ]


class Features(NamedTuple):
    """What changes no gradient either. Each case has cp 2, or two dp ranks for each replica."""

    processes: int
    cp: int
    name: str  # of the variant
    overrides: tuple[str, ...]


REPLICAS = "parallel_config.data_parallel_replicate_size=2"
SELECTIVE, FULL = (f"train_config.activation_checkpointing={x}" for x in ("selective", "full"))
FEATURES = [
    *(Features(4, cp, name, (REPLICAS,)) for cp in (2, 1) for name in ("tied", "untied")),
    Features(2, 2, "untied", (SELECTIVE,)),
    Features(2, 2, "untied", (FULL, "train_config.compile=true")),
]


@pytest.fixture(scope="module")
def all_results(folder, held_out, once):
    """{(dp, cp, accumulation or "whole", variant), or Features: what the worker found}"""
    cases = {world_size: cases_of(world_size, folder, held_out) for world_size in (1, 2, 4)}

    def fill(path):
        for world_size, found in cases.items():
            (path / "cases.json").write_text(json.dumps([*found.values()]))
            out = path / f"{world_size}.pt"
            run_ranks(world_size, ROOT / "tests/gradients_worker.py", path / "cases.json", out)

    path, found = once("gradients", fill), {}
    for world_size, keys in cases.items():
        found |= dict(zip(keys, torch.load(path / f"{world_size}.pt"), strict=True))
    return found


@pytest.fixture(scope="module")
def results(all_results):
    return {key: result for key, result in all_results.items() if not isinstance(key, Features)}


def cases_of(world_size, folder, held_out) -> dict[tuple, dict]:
    """The cases of gradients_worker.py on so many processes, by the keys of `results`."""
    layouts = [layout for layout in LAYOUTS if layout[0] * layout[1] == world_size]
    cases = {}
    for dp, cp in layouts:
        for accumulation, name in ACCUMULATION:
            variant = VARIANTS[name]
            cases[dp, cp, accumulation, variant] = {
                "overrides": [
                    *overrides(folder, cp, accumulation, variant),
                    f"data_config.validation_source={held_out}",
                    "train_config.eval_iters=2",
                ],
                "ignored_from_row": variant.ignored_from_row,
            }
    for (dp, cp), (variant, batch_size, lengths) in WHOLE.items() if world_size == 4 else ():
        settings = overrides(folder, cp, len(lengths), variant)
        cases[dp, cp, "whole", variant] = {
            "overrides": [*settings, f"data_config.batch_size={batch_size}"],
            "ignored_from_row": variant.ignored_from_row,
            "lengths": lengths,
        }
    for features in FEATURES:
        if features.processes == world_size:
            settings = overrides(folder, features.cp, variant=VARIANTS[features.name])
            cases[features] = {"overrides": [*settings, *features.overrides]}
    return cases


@pytest.fixture(scope="module")
def expected(folder, held_out, results):
    """{variant: loss, gradients, ...} of the dense reference, in float64."""
    found = {}
    for variant in VARIANTS.values():
        weights = results[(1, 1, 1, variant)]["weights"]
        found[variant] = dense_reference(folder, weights, variant)
        config = LlamaConfig.from_preset("tiny", shape(variant))
        weights = {name: weight.double() for name, weight in weights.items()}
        losses = reference.label_losses(weights, evaluated_documents(held_out), config)
        found[variant]["eval_losses"] = [(place, loss.item()) for place, loss in losses]
    return found


def dense_reference(folder, weights, variant, batch_size=BATCH_SIZE, lengths=None) -> dict:
    """Loss, gradients and what else of the second batch, in float64, one document at a time.
    lengths: of the documents, instead of those that the batch has.
    """
    rows = open_data(folder).rows(batch_size, batch_size, SEQLEN)
    tokens, labels = torch.from_numpy(rows.tokens).flatten(), torch.from_numpy(rows.labels).clone()
    if variant.ignored_from_row is not None:
        labels[variant.ignored_from_row :] = IGNORED_LABEL
    lengths = lengths or rows.document_lengths
    documents = list(zip(tokens.split(lengths), labels.flatten().split(lengths), strict=True))
    weights = {name: weight.double().requires_grad_() for name, weight in weights.items()}
    config = LlamaConfig.from_preset("tiny", shape(variant))
    loss = reference.mean_loss(weights, documents, config)
    loss.backward()
    gradients = {name: weight.grad for name, weight in weights.items()}
    return {
        "loss": loss.item(),
        "gradients": gradients,
        "grad_norm": torch.stack([g.norm() for g in gradients.values()]).norm().item(),
        "num_labels": (labels != IGNORED_LABEL).sum().item(),
        "area": sum(len(doc) ** 2 / (2 if variant.is_causal else 1) for doc, _ in documents),
    }


def evaluated_documents(held_out):
    """(tokens, labels) of each piece of a document in the first two batches."""
    rows = open_data(held_out, seed=0).rows(0, 2 * BATCH_SIZE, SEQLEN)
    tokens, labels = (torch.from_numpy(x).flatten() for x in (rows.tokens, rows.labels))
    lengths = rows.document_lengths
    return list(zip(tokens.split(lengths), labels.split(lengths), strict=True))


def test_on_one_process_the_loss_and_all_gradients_equal_a_dense_model_s(config, cp_group, folder):
    """The central promise at its smallest: main.py's functions, in the order of `train`, beside a
    Llama in float64 that the tests write out and that sees one document at a time.
    """
    sources = main.set_up(overrides(folder))
    mesh = main.build_mesh()
    model = main.parallelize_model(main.build_llama_model(), mesh)
    batch = main.prepare_batch(sources["train"], mesh, model.config, None, train_iter=1)
    ((input_ids, labels, position_ids, key),) = batch.micro_batches
    token_losses = model(input_ids, position_ids, key, labels)
    loss = main.loss_func(token_losses, batch.num_labels, mesh)
    loss.backward()

    weights = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
    truth = dense_reference(folder, weights, TIED)
    assert batch.num_labels == truth["num_labels"]
    assert loss.item() == pytest.approx(truth["loss"], rel=1e-5)
    for name, param in model.named_parameters():
        assert relative_error(param.grad.full_tensor(), truth["gradients"][name]) < 1e-5, name


@pytest.mark.parametrize("accumulation, name", ACCUMULATION)
@pytest.mark.parametrize("dp, cp", LAYOUTS)
def test_losses_and_gradients_do_not_depend_on_the_layout(
    dp, cp, accumulation, name, results, expected
):
    variant = VARIANTS[name]
    result, truth = results[(dp, cp, accumulation, variant)], expected[variant]
    assert result["num_labels"] == truth["num_labels"]
    assert result["area"] == truth["area"]
    assert result["loss"] == pytest.approx(truth["loss"], rel=1e-5)
    assert result["grad_norm"] == pytest.approx(truth["grad_norm"], rel=1e-5)
    assert result["gradients"].keys() == truth["gradients"].keys()
    for name, gradient in result["gradients"].items():
        assert relative_error(gradient, truth["gradients"][name]) < 1e-5, name


@pytest.mark.parametrize("accumulation, name", ACCUMULATION)
@pytest.mark.parametrize("dp, cp", LAYOUTS)
def test_the_held_out_loss_by_position_does_not_depend_on_the_layout(
    dp, cp, accumulation, name, results, expected
):
    """The positions are those in the document, in powers of two: 1-2, 3-4, 5-8... to 65-101."""
    evaluation = results[(dp, cp, accumulation, VARIANTS[name])]["evaluation"]
    losses = expected[VARIANTS[name]]["eval_losses"]
    eval_loss = sum(loss for _, loss in losses) / len(losses)
    assert evaluation["eval_loss"] == pytest.approx(eval_loss, rel=1e-5)

    buckets = {"2": (1, 2), "4": (3, 4), "8": (5, 8), "16": (9, 16), "32": (17, 32)}
    buckets |= {"64": (33, 64), "128": (65, 101)}
    by_position, labels = (evaluation[f"eval_{x}_by_position"] for x in ("loss", "labels"))
    assert list(by_position) == list(labels) == list(buckets)
    for end, (first, last) in buckets.items():
        found = [loss for place, loss in losses if first <= place <= last]
        assert labels[end] == len(found), end
        assert by_position[end] == pytest.approx(sum(found) / len(found), rel=1e-5), end
    mean = sum(by_position[end] * labels[end] for end in buckets) / sum(labels.values())
    assert mean == pytest.approx(evaluation["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("features", FEATURES, ids=lambda x: f"{x.name}, {x.overrides[-1]}")
def test_replicas_recomputation_and_compilation_change_no_gradient(features, all_results, expected):
    result, truth = all_results[features], expected[VARIANTS[features.name]]
    assert result["loss"] == pytest.approx(truth["loss"], rel=1e-5)
    assert result["grad_norm"] == pytest.approx(truth["grad_norm"], rel=1e-5)
    for name, gradient in result["gradients"].items():
        assert relative_error(gradient, truth["gradients"][name]) < 1e-5, name
    parameters = sum(weight.numel() for weight in result["weights"].values())
    assert result["local_parameters"] == parameters / 2, "sharded over two ranks"


@pytest.mark.parametrize("dp, cp", WHOLE)
def test_ranks_that_have_whole_documents_gather_nothing_and_give_the_same_gradients(
    dp, cp, results, folder
):
    """Other documents on each; in one case it is the first of two micro-batches, and one is cut."""
    variant, batch_size, lengths = WHOLE[dp, cp]
    result = results[(dp, cp, "whole", variant)]
    assert result["gathers"] == [False, True][: len(lengths)]
    every_length = sum(lengths, []) * dp
    truth = dense_reference(folder, result["weights"], variant, batch_size, every_length)
    for figure in ("num_labels", "area", "loss", "grad_norm"):
        assert result[figure] == pytest.approx(truth[figure], rel=1e-5), figure
    for name, gradient in result["gradients"].items():
        assert relative_error(gradient, truth["gradients"][name]) < 1e-5, name


def test_the_batch_has_what_it_should(folder):
    """One-token documents, a document that fills a row, labels that are ignored."""
    rows = open_data(folder).rows(BATCH_SIZE, BATCH_SIZE, SEQLEN)
    assert min(rows.document_lengths) == 1
    assert max(rows.document_lengths) == SEQLEN
    assert (rows.labels == IGNORED_LABEL).sum() == (rows.tokens == 256).sum() > 2


def test_each_rank_holds_its_share_of_the_model(results):
    """And on the way there never more than one whole matrix; the worker sees a meta model first."""
    for (dp, cp, *_), result in results.items():
        parameters = sum(weight.numel() for weight in result["weights"].values())
        assert result["local_parameters"] == parameters / (dp * cp)
        if dp * cp > 1:  # on one process the shards themselves are whole
            assert result["whole_parameters"] == 1


def test_weights_do_not_depend_on_the_layout(results):
    """Nor on FSDP: they are those of the plain model, initialised by the same seed."""
    for (dp, cp, accumulation, variant), result in results.items():
        config = LlamaConfig.from_preset("tiny", shape(variant))
        plain = LlamaForCausalLM(config)
        init_weights(plain, 0.1, seed=42)
        for name, weight in plain.named_parameters():
            assert torch.equal(weight, result["weights"][name]), (dp, cp, accumulation, name)
    another = LlamaForCausalLM(config)
    init_weights(another, 0.1, seed=43)
    assert not torch.equal(another.lm_head.weight, plain.lm_head.weight)


def test_initial_weights_are_those_of_the_config():
    model = LlamaForCausalLM(LlamaConfig.from_preset("tiny", {}))
    init_weights(model, 0.02, seed=1)
    matrices = {n: p for n, p in model.named_parameters() if p.ndim == 2}
    for name, weight in matrices.items():
        assert weight.std().item() == pytest.approx(0.02, rel=0.02), name
        assert abs(weight.mean().item()) < 0.0005, name
    assert (model.model.norm.weight == 1).all()
    first_rows = [weight.flatten()[:8].tolist() for weight in matrices.values()]
    assert len({tuple(row) for row in first_rows}) == len(matrices)  # no two start alike


def test_adamw_decays_matrices_alone_and_steps_like_the_formula():
    """One step against AdamW written out (https://arxiv.org/abs/1711.05101, algorithm 2)."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_preset("tiny", {"num_hidden_layers": 1}))
    optimizer, lr_scheduler = main.build_optimizer(
        model,
        {
            **main.train_config["optimizer_config"],
            "learning_rate": 3e-4,
            "weight_decay": 0.5,
            "warmup_iters": 4,
        },
    )
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    learning_rate = 3e-4 / 4  # the first of four warm-up steps
    for name, param in model.named_parameters():
        grad, decay = param.grad.double(), 0.5 if param.ndim == 2 else 0.0
        # Bias correction in the first step makes m = g and v = g^2.
        step = grad / (grad.abs() + 1e-8) + decay * before[name]
        after = before[name] - learning_rate * step
        assert relative_error(param - before[name], after - before[name]) < 1e-3, name
        assert relative_error(param, after) < 1e-6, name


def test_the_gradient_norm_is_exact_for_large_matrices(cp_group):
    """torch's float32 norm of so many numbers is off by 9e-5 on a CPU, and by less in a shard."""
    model = torch.nn.Linear(2048, 2048, bias=False)
    fully_shard(model)
    model.weight.grad = torch.randn_like(model.weight)
    optimizer, _ = main.build_optimizer(model, main.train_config["optimizer_config"])
    norm = main.clip_gradients(model, optimizer, torch.tensor(1.0))
    assert norm.dtype == torch.float32
    exact = model.weight.grad.full_tensor().double().norm().item()
    assert norm.item() == pytest.approx(exact, rel=1e-6)


def test_training_steps_like_the_formulas(folder, tmp_path):
    """Five steps at dp 2 x cp 1 and accumulation 2, by main.py, against AdamW, clipping and the
    schedule written out around the dense reference, all in float64.
    """
    steps, warmup, peak, floor, decay, max_norm = 5, 2, 1e-3, 0.1, 0.5, 0.3
    run_ranks(
        2,
        "main.py",
        *overrides(folder, cp=1, accumulation=2),
        f"train_config.output_dir={tmp_path}",
        f"train_config.train_iters={steps}",
        "train_config.activation_checkpointing=full",
        f"train_config.optimizer_config.learning_rate={peak}",
        f"train_config.optimizer_config.min_learning_rate_ratio={floor}",
        f"train_config.optimizer_config.warmup_iters={warmup}",
        f"train_config.optimizer_config.weight_decay={decay}",
        f"train_config.optimizer_config.max_clip_grad_norm={max_norm}",
    )
    config = LlamaConfig.from_preset("tiny", shape())
    model = LlamaForCausalLM(config)
    init_weights(model, config.initializer_range, seed=42)
    weights = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    first_moment = {n: torch.zeros_like(w) for n, w in weights.items()}
    second_moment = {n: torch.zeros_like(w) for n, w in weights.items()}
    source = open_data(folder)
    rates = [peak / 2, peak]  # then half a cosine over the three steps that are left
    rates += [peak * (floor + (1 - floor) * (1 + math.cos(math.pi * i / 3)) / 2) for i in (1, 2, 3)]
    for step, record in enumerate(read_metrics(tmp_path), start=1):
        rows = source.rows((step - 1) * BATCH_SIZE, BATCH_SIZE, SEQLEN)
        tokens, labels = (torch.from_numpy(x).flatten() for x in (rows.tokens, rows.labels))
        lengths = rows.document_lengths
        documents = list(zip(tokens.split(lengths), labels.split(lengths), strict=True))
        loss = reference.mean_loss(weights, documents, config)
        gradients = dict(zip(weights, torch.autograd.grad(loss, weights.values()), strict=True))
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
        assert norm > max_norm
        rate = rates[step - 1]
        assert record["step"] == step
        assert record["lr"] == pytest.approx(rate, rel=1e-12)
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norm, rel=1e-5)
        with torch.no_grad():
            for name, weight in weights.items():
                gradient = gradients[name] * (max_norm / norm)
                first_moment[name].mul_(0.9).add_(0.1 * gradient)
                second_moment[name].mul_(0.95).add_(0.05 * gradient**2)
                mean = first_moment[name] / (1 - 0.9**step)
                deviation = (second_moment[name] / (1 - 0.95**step)).sqrt()
                weight.mul_(1 - rate * decay if weight.ndim == 2 else 1)
                weight.sub_(rate * mean / (deviation + 1e-8))
    assert step == steps


def test_fsdp_wraps_each_layer_and_keeps_gradients_in_float32(config, cp_group, folder):
    """And in bfloat16 RoPE's cos and sin arrive uncast: FSDP leaves the layers' inputs alone."""
    bfloat16 = ["train_config.dtype=bfloat16", "data_config.batch_size=1"]
    sources = main.set_up([*overrides(folder), *bfloat16])
    mesh = main.build_mesh()
    model = main.parallelize_model(main.build_llama_model(), mesh)
    assert isinstance(model, FSDPModule)
    assert all(isinstance(layer, FSDPModule) for layer in model.model.layers)
    seen = []
    model.model.layers[0].register_forward_hook(
        lambda layer, inputs, output: seen.extend(x.dtype for x in (*inputs[:3], output))
    )
    batch = main.prepare_batch(sources["train"], mesh, model.config, None, 0)
    ((input_ids, labels, position_ids, key),) = batch.micro_batches
    main.loss_func(model(input_ids, position_ids, key, labels), batch.num_labels, mesh).backward()
    assert seen == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    for name, param in model.named_parameters():
        assert param.dtype == param.grad.dtype == torch.float32, name
        assert param.device_mesh == main.dp_cp_mesh(mesh)


def test_learning_rate_warms_up_and_decays_to_the_floor(monkeypatch):
    monkeypatch.setitem(main.train_config, "train_iters", 110)
    config = {**main.train_config["optimizer_config"], "warmup_iters": 10, "learning_rate": 1.0}
    optimizer, lr_scheduler = main.build_optimizer(torch.nn.Linear(2, 2), config)
    rates = []
    for _ in range(110):
        rates.append(lr_scheduler.get_last_lr()[0])
        optimizer.step()
        lr_scheduler.step()
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[59] == pytest.approx(0.1 + 0.9 / 2)  # half-way down the cosine
    assert rates[109] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(
    config, cp_group, folder, tmp_path
):
    output_dir = f"train_config.output_dir={tmp_path}"
    sources = main.set_up([*overrides(folder), output_dir])
    mesh = main.build_mesh()
    model = main.parallelize_model(main.build_llama_model(), mesh)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("inf")
    optimizer, lr_scheduler = main.build_optimizer(model, main.train_config["optimizer_config"])
    before = [p.full_tensor().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError, match=r"^step 1: the loss is nan .*rank 0: its part of"):
        main.train(model, optimizer, lr_scheduler, mesh, sources, train_iters=5)
    for param, weight in zip(model.parameters(), before, strict=True):
        assert torch.equal(param.full_tensor(), weight)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_positions_count_within_documents_and_labels_pad_with_ignored(
    config, cp_group, folder, monkeypatch
):
    monkeypatch.setattr(main, "balanced_chunk_size", lambda *_: 50)
    sources = main.set_up(overrides(folder))
    mesh = main.build_mesh()
    ((input_ids, labels, cu_seqlens),) = main.prepare_data(sources["train"], mesh, train_iter=0)
    assert cu_seqlens.dtype == torch.int32
    local_ids, local_labels, position_ids, key = main.prepare_magi_attention(
        input_ids, labels, cu_seqlens, main.build_llama_config(), mesh
    )
    assert key.pad_size == len(local_ids) - BATCH_SIZE * SEQLEN > 0
    expected = torch.cat([torch.arange(length) for length in cu_seqlens.diff().tolist()])
    assert torch.equal(position_ids[: -key.pad_size], expected)
    assert torch.equal(local_ids[: -key.pad_size], input_ids)
    assert torch.equal(local_labels[: -key.pad_size], labels)
    assert (local_labels[-key.pad_size :] == IGNORED_LABEL).all()


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("data_config.source=/nowhere/*.txt", "data_config.source='/nowhere/*.txt' names no file"),
        ("model_config.preset=llama-2b", "must be one of tiny, llama-1b, llama-3b, llama-8b"),
        ("model_config.overrides.num_key_value_heads=3", "must be a multiple of"),
        ("model_config.overrides.vocab_size=100", "token ids up to 256"),
        ("data_config.seqlen=1000", "1 step x batch_size 4 x seqlen 1000 = 4,000 are needed"),
        ("parallel_config.context_parallel_backend=magi_attention", "cannot run: it needs Hopper"),
        ("train_config.output_dir=/dev/null/run", "output_dir='/dev/null/run' cannot be written"),
    ],
)
def test_what_cannot_run_is_said_before_anything_is_built(config, folder, override, sentence):
    with pytest.raises(ValueError) as error:
        main.set_up([*overrides(folder), override])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
