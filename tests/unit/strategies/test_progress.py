import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from omnilit.data.epochs import EpochSteps
from omnilit.strategies.progress import Position, read_place, resume_at, resume_loops


class Counting(LightningModule):
    """Notes (epoch, batch) of every micro-batch."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.trainer.current_epoch, batch_idx))
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Remaining:
    """Like the training loader: knows its whole length, yields what is left."""

    def __init__(self, length, done=0):
        self.length, self.done = length, done

    def __len__(self):
        return self.length

    def __iter__(self):
        done, self.done = self.done, 0
        yield from [torch.ones(1, 2)] * (self.length - done)


class SaveAt(Callback):
    """Keeps what Lightning would save after one step, or at the epoch's end right after it."""

    def __init__(self, step, *, at_epoch_end=False):
        self.step, self.at_epoch_end, self.saved = step, at_epoch_end, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if not self.at_epoch_end:
            self.save(trainer)

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer)

    def save(self, trainer):
        if trainer.global_step == self.step and not self.saved:
            self.saved.update(trainer._checkpoint_connector.dump_checkpoint())


def train(loader, *, accumulation, callbacks=(), checkpoint=None):
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=2,
        accumulate_grad_batches=accumulation,
        callbacks=list(callbacks),
    )
    module = Counting()
    trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=False)
    return module.seen, trainer


@pytest.mark.parametrize(
    ("save_at", "steps_now", "accumulation_now", "first", "num_seen"),
    [
        (2, 4, 2, (0, 4), 2 * 2 + 8),  # inside an epoch of four steps
        (4, 4, 2, (1, 0), 8),  # on its last step: the next epoch begins
        (4, 6, 2, (0, 8), 2 * 2 + 12),  # the limit was raised: the epoch goes on
        (2, 4, 3, (0, 6), 2 * 3 + 12),  # another accumulation
    ],
)
def test_training_goes_on_at_the_next_step(
    tmp_path, save_at, steps_now, accumulation_now, first, num_seen
):
    callback = SaveAt(save_at)
    train(Remaining(8), accumulation=2, callbacks=[callback])
    saved = callback.saved
    place = read_place(saved["loops"], step=save_at)
    assert place == {"step": save_at, "epoch": 0}
    position = resume_at(**place, steps=EpochSteps(save_at, steps_now - save_at))
    saved["loops"] = resume_loops(saved["loops"], position, accumulation=accumulation_now)
    checkpoint = tmp_path / "resumed.ckpt"
    torch.save(saved, checkpoint)
    loader = Remaining(steps_now * accumulation_now, position.steps_in_epoch * accumulation_now)
    seen, trainer = train(loader, accumulation=accumulation_now, checkpoint=checkpoint)
    assert seen[0] == first
    assert len(seen) == num_seen
    assert trainer.global_step == save_at + num_seen // accumulation_now
    assert trainer.current_epoch == 2


@pytest.mark.parametrize(("step", "epoch"), [(4, 0), (8, 1)])
def test_a_save_at_the_end_of_an_epoch_belongs_to_that_epoch(step, epoch):
    callback = SaveAt(step, at_epoch_end=True)
    train(Remaining(8), accumulation=2, callbacks=[callback])
    assert read_place(callback.saved["loops"], step=step) == {"step": step, "epoch": epoch}


def test_before_the_first_step_the_place_is_the_first_epoch():
    progress = {"epoch_progress": {"current": {"started": 0}}}
    assert read_place({"fit_loop": progress}, step=0) == {"step": 0, "epoch": 0}
    assert resume_at(step=0, epoch=0, steps=EpochSteps(0, 5)) == Position(0, 0, 0)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [((70, 21), Position(90, 1, 70)), ((70, 0), Position(90, 2, 0)), ((0, 9), Position(90, 1, 0))],
)
def test_an_epoch_is_over_when_its_loader_has_nothing_left_of_it(steps, expected):
    assert resume_at(step=90, epoch=1, steps=EpochSteps(*steps)) == expected
