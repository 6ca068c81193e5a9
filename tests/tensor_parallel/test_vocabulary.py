"""A vocabulary that no tp divides: padding is zeros that nobody looks up, scores, trains or exports."""

import pytest
import torch
import torch.distributed as dist

from tpmp_kernels.comm import SelfCommunicator, communicator
from tpmp_kernels.tensor_parallel import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    padded_vocab_size,
    shard_of,
)

VOCAB, HIDDEN = 41, 8


def rank(number: int, size: int) -> SelfCommunicator:
    comm = SelfCommunicator()
    comm.rank, comm.size = number, size
    return comm


def test_sizes_are_rounded_up():
    rows = [len(VocabParallelHead(4, v, rank(0, 1)).weight) for v in (1, 41, 64, 127, 129, 256)]
    assert rows == [1, 64, 64, 128, 256, 256]
    assert [padded_vocab_size(v) for v in (1, 128, 129, 256, 50257)] == [128, 128, 256, 256, 50304]
    assert padded_vocab_size(50257, 7) == 50260


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_whole_is_of_one_shape_for_every_tp(size):
    full = torch.randn(VOCAB, HIDDEN)
    parts = []
    for number in range(size):
        weight = VocabParallelEmbedding(VOCAB, HIDDEN, rank(number, size)).weight
        weight.data.copy_(shard_of(full, weight, rank(number, size)))
        parts.append(weight.detach())
    whole = torch.cat(parts)
    assert whole.shape == (64, HIDDEN) and torch.equal(whole[:VOCAB], full) and not whole[VOCAB:].any()


def test_rows_of_padding_are_zero_before_anybody_fills_them():
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        modules = VocabParallelEmbedding(VOCAB, HIDDEN, rank(0, 1)), VocabParallelHead(HIDDEN, VOCAB, rank(0, 1))
    finally:
        torch.use_deterministic_algorithms(False)
    for module in modules:
        assert module.weight[:VOCAB].isnan().all() and (module.weight[VOCAB:] == 0).all()


def run_padding(sequence_parallel: bool, padded: int):
    how = {"padded_vocab": padded, "sequence_parallel": sequence_parallel}
    with communicator(dist.group.WORLD, name="padding") as comm:
        embed = VocabParallelEmbedding(VOCAB, HIDDEN, comm, **how)
        head = VocabParallelHead(HIDDEN, VOCAB, comm, weight=embed.weight, **how)
        torch.manual_seed(comm.rank)
        embed.weight.data[: max(0, VOCAB - comm.rank * len(embed.weight))].normal_()
        tokens = torch.arange(VOCAB + 7).clamp(max=VOCAB - 1)
        loss = head.loss(embed(tokens), tokens.flip(0))
        loss.backward()
        with torch.no_grad():
            return loss.item(), head(embed(tokens)), embed.weight.grad


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("size", "padded"), [(2, 64), (4, 64), (2, 128)])  # on 4, and of 128, a rank has nothing else
def test_padding_has_no_score_and_no_gradient(ranks, size, padded, sequence_parallel):
    results = ranks(size).run(run_padding, sequence_parallel, padded)
    losses, logits, grads = zip(*results, strict=True)
    assert len(set(losses)) == 1
    logits, grads = torch.cat(logits, -1), torch.cat(grads)
    assert logits.shape == (VOCAB + 7, padded) and logits[:, :VOCAB].isfinite().all()
    assert (logits[:, VOCAB:] == -torch.inf).all()
    targets = torch.arange(VOCAB + 7).clamp(max=VOCAB - 1).flip(0)
    expected = torch.nn.functional.cross_entropy(logits[:, :VOCAB], targets)
    assert abs(losses[0] - expected) <= 1e-5 * expected
    assert grads[:VOCAB].any(1).all() and not grads[VOCAB:].any()


def run_sent(sequence_parallel: bool) -> list[tuple[str, int]]:
    """The collectives of a loss' backward, and the elements that each gives a rank."""
    with communicator(dist.group.WORLD, name="sent") as comm:
        head = VocabParallelHead(HIDDEN, VOCAB, comm, sequence_parallel=sequence_parallel)
        x = torch.zeros(3 if sequence_parallel else 6, HIDDEN, requires_grad=True)
        loss, called, collect = head.loss(x, torch.arange(6)), [], comm._collect
        comm._collect = lambda call, *rest: (called.append((call.kind, call.numel)), collect(call, *rest))[1]
        loss.backward()
        return called


def test_the_gradient_of_a_shard_of_tokens_is_scattered_as_it_is_added(ranks):
    assert ranks(2).run(run_sent, True) == [[("reduce_scatter", 3 * HIDDEN)]] * 2
    assert ranks(2).run(run_sent, False) == [[("all_reduce", 6 * HIDDEN)]] * 2


def test_ids_outside_of_the_vocabulary_find_nothing_and_train_nothing():
    embed = VocabParallelEmbedding(VOCAB, HIDDEN, rank(0, 1))
    y = embed(torch.tensor([VOCAB, 63, -1]))
    y.sum().backward()
    assert not y.any() and not embed.weight.grad.any()


def test_a_tied_head_is_one_parameter_with_the_embedding():
    comm = rank(0, 1)
    embed = VocabParallelEmbedding(VOCAB, HIDDEN, comm)
    model = torch.nn.ModuleDict({"embed": embed, "head": VocabParallelHead(HIDDEN, VOCAB, comm, weight=embed.weight)})
    assert [name for name, _ in model.named_parameters()] == ["embed.weight"]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: VocabParallelEmbedding(VOCAB, HIDDEN, rank(0, 2), padded_vocab=40),
            "VocabParallelEmbedding: padded_vocab is 40, less than vocab_size, 41; pass at least that, or None",
        ),
        (
            lambda: VocabParallelHead(HIDDEN, VOCAB, rank(0, 3)),
            "padded_vocab is 64, not divisible by tp=3; use tp in [1, 2] or change padded_vocab",
        ),
        (
            lambda: VocabParallelHead(
                HIDDEN, VOCAB, rank(1, 2), weight=VocabParallelEmbedding(VOCAB + 1, HIDDEN, rank(1, 2)).weight
            ),
            "VocabParallelHead: weight is [32, 8] for ids range(32, 42), expected [32, 8] for range(32, 41); pass that "
            "of an embedding of the same hidden, vocab_size and padded_vocab",
        ),
        (
            lambda: ColumnParallelLinear(HIDDEN, 12, rank(0, 4), gather_output=True, replicas=2),
            "ColumnParallelLinear: gather_output would repeat columns that 2 ranks share; keep the output sharded, or "
            "use replicas=1",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, sentence):
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == sentence
