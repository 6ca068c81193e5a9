"""Four linear layers on two processors, the two ways there are: the smallest model parallelism that is right.

The model is Y = W4 (W3 (W2 (W1 X))): four 4x4 weights, no biases, mean squared error, plain SGD.

Tensor parallel: every weight is cut into blocks, and each processor holds two of the four of every layer.

        inputs 0-1  inputs 2-3
    W = [  W11         W12   ]   outputs 0-1        layers 1 and 3: processor 0 holds W11 W12, processor 1 W21 W22
        [  W21         W22   ]   outputs 2-3        layers 2 and 4: processor 0 holds W11 W21, processor 1 W12 W22

    Layers 1 and 3 make half of the outputs on each processor, from all inputs. That half is just what layers 2 and 4
    need as input there, so nothing moves in between; they make all outputs, but only half of each sum, and one
    all-reduce adds the two. Backward mirrors it: one all-reduce in front of each pair.

Pipeline parallel: layers 1-2 live on processor 0, layers 3-4 on processor 1. Activations go forward, their gradients
back, and every operation is the one that a single process does, so the result is the same to the last bit.

DistributedDataParallel(model, device_ids=[0, 1]) is neither. DDP is data parallel: it keeps the whole model in every
process, cuts the batch and averages gradients; it cuts no weight and places no layer. Two device_ids do not change
that: DDP refuses them, for a module on one device takes one id, and a module spread over devices by hand takes none.

    python examples/four_layers.py          starts both processors itself (two local processes), no GPU needed
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tpmp_kernels.comm import Communicator, communicator
from tpmp_kernels.comm.autograd import all_reduce, copy

LAYERS, WIDTH, HALF, BATCH, EPOCHS, LR = 4, 4, 2, 8, 100, 0.01
Result = tuple[list[float], list[torch.Tensor]]  # the loss of every epoch, the weights at the end


def problem() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """The initial weights, and a batch of a linear map to learn. The same on every processor, from one seed."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.eye(WIDTH) + torch.randn(WIDTH, WIDTH, generator=generator) / 5 for _ in range(LAYERS)]
    x = torch.randn(BATCH, WIDTH, generator=generator)
    target = x @ torch.randn(WIDTH, WIDTH, generator=generator).T / 2
    return weights, x, target


def sgd_step(weights: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for weight in weights:
            weight -= LR * weight.grad
            weight.grad = None


def train_alone() -> Result:
    """One process: the reference."""
    weights, x, target = problem()
    for weight in weights:
        weight.requires_grad_()
    losses = []
    for _ in range(EPOCHS):
        y = x
        for weight in weights:
            y = F.linear(y, weight)
        loss = F.mse_loss(y, target)
        loss.backward()
        sgd_step(weights)
        losses.append(loss.item())
    return losses, weights


def train_blocks(comm: Communicator) -> Result:
    """Tensor parallel: this processor's blocks of every layer, [2, 4] (outputs cut) and [4, 2] (inputs cut) in turn."""
    weights, x, target = problem()
    mine = slice(comm.rank * HALF, (comm.rank + 1) * HALF)
    shards = [w[mine].clone() if i % 2 == 0 else w[:, mine].clone() for i, w in enumerate(weights)]
    for shard in shards:
        shard.requires_grad_()
    losses = []
    for _ in range(EPOCHS):
        y = x
        for rows, columns in ((shards[0], shards[1]), (shards[2], shards[3])):
            y_half = F.linear(copy(y, comm, tag="pair"), rows)
            y = all_reduce(F.linear(y_half, columns), comm, tag="pair")
        loss = F.mse_loss(y, target)
        loss.backward()
        sgd_step(shards)
        losses.append(loss.item())
    return losses, shards


def train_pipeline(comm: Communicator) -> Result:
    """Pipeline parallel: layers 1-2 on processor 0, layers 3-4 on processor 1, which alone sees the loss."""
    weights, x, target = problem()
    stage = weights[comm.rank * HALF :][:HALF]
    for weight in stage:
        weight.requires_grad_()
    losses = []
    for _ in range(EPOCHS):
        if comm.rank == 0:
            h = F.linear(F.linear(x, stage[0]), stage[1])
            comm.send(h, 1, tag="activation")
            h.backward(comm.recv(torch.empty_like(h), 1, tag="gradient"))
        else:
            h = comm.recv(torch.empty(BATCH, WIDTH), 0, tag="activation").requires_grad_()
            loss = F.mse_loss(F.linear(F.linear(h, stage[0]), stage[1]), target)
            loss.backward()
            comm.send(h.grad, 0, tag="gradient")
            losses.append(loss.item())
        sgd_step(stage)
    return losses, stage


def processor(rank: int, port: int) -> dict[str, tuple[list[float], list]]:
    """What each of the two processes runs; plain lists go back, which hold a float32 exactly."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # both processors are on this machine
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    results = {}
    with communicator(dist.group.WORLD) as comm:
        for name, train in (("blocks", train_blocks), ("pipeline", train_pipeline)):
            losses, weights = train(comm)
            results[name] = losses, [weight.tolist() for weight in weights]
    dist.destroy_process_group()
    return results


def start_processors() -> list[dict]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # port 0: any free one
    # Forked before torch has computed anything here, which is when forking is cheap and safe.
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        return list(pool.map(processor, range(2), [store.port] * 2))


def print_shards(shards: list[list[torch.Tensor]]) -> None:
    print("Tensor parallel: the blocks of each layer after training")
    for layer in range(LAYERS):
        for rank, one in enumerate("12"):
            names, dim = ((f"W{one}1", f"W{one}2"), 1) if layer % 2 == 0 else ((f"W1{one}", f"W2{one}"), 0)
            blocks = zip(names, shards[rank][layer].split(HALF, dim), strict=True)
            text = "".join(
                f"   {name} {[[round(w, 3) for w in row] for row in block.tolist()]}" for name, block in blocks
            )
            print(f"  layer {layer + 1}, processor {rank}:{text}")


def values(losses: list[float], weights: list[torch.Tensor]) -> torch.Tensor:
    """Everything that training made, as one vector: 100 losses and 64 weights."""
    return torch.cat([torch.tensor(losses), *(weight.detach().flatten() for weight in weights)])


def main() -> None:
    results = start_processors()
    losses, weights = train_alone()
    shards = [[torch.tensor(shard) for shard in result["blocks"][1]] for result in results]
    print_shards(shards)
    print("Pipeline parallel: layers 1-2 on processor 0, layers 3-4 on processor 1\n")

    whole = [torch.cat([shards[0][i], shards[1][i]], dim=i % 2) for i in range(LAYERS)]
    stages = [torch.tensor(weight) for result in results for weight in result["pipeline"][1]]
    block_losses, pipeline_losses = results[0]["blocks"][0], results[1]["pipeline"][0]
    print("epoch   one process        blocks      pipeline   (mean squared error)")
    for epoch in [0, *range(9, EPOCHS, 10)]:
        print(f"{epoch + 1:5}  {losses[epoch]:12.8f}  {block_losses[epoch]:12.8f}  {pipeline_losses[epoch]:12.8f}")

    alone = values(losses, weights)
    off = (values(block_losses, whole) - alone).abs().max().item()
    bits = alone.view(torch.int32) ^ values(pipeline_losses, stages).view(torch.int32)
    different = sum((each & 0xFFFFFFFF).bit_count() for each in bits.tolist())
    print(f"\nAgainst one process, over all {EPOCHS} losses and all 64 weights after training, in float32:")
    print(f"  blocks:    largest absolute difference {off:.1e} (at most 1e-6: half sums round differently)")
    print(f"  pipeline:  {different} bits differ (0: the same operations on the same numbers)")
    if off > 1e-6 or different:
        raise SystemExit("four_layers: model parallel training differs from one process")


if __name__ == "__main__":
    main()
