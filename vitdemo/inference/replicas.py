"""Starts replicas, hands out ranges of images, and replaces a replica that dies or hangs; every image exactly once.

The driver carries only ranges of indices there and rows back; each replica opens the data set and the artifact itself.
A range that a replica did not bring back, because it died or hangs, is done again by its successor or by another one.

Ray restarts actors and retries their calls too (``max_restarts``, ``max_task_retries``), but tells nobody: a loss could
be neither counted nor reported, a replica that is being restarted not told from one that hangs, and a retried range
waits for the successor while others are free. Without retries the calls of an actor that is to be restarted fail 1.3 to
2 s after its death, those of another one at once (Ray 2.60). So here a successor is a new actor, and what a replica had
in hand goes to whoever is free.
"""

import socket
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

import psutil
from tqdm.auto import tqdm

from vitdemo.dataset.dataset import Dataset
from vitdemo.engines.contract import Engine
from vitdemo.errors import EngineFailure, VitdemoError, at_least_1, reason_of
from vitdemo.inference.actor import Place, Replica, Shard, installed
from vitdemo.inference.cluster import Share, connect, loss_of, place_replicas
from vitdemo.inference.schedule import Schedule
from vitdemo.machine import message_stream, now
from vitdemo.models.classes import match_classes


@dataclass
class Task:
    """What a replica was asked for. indices: of a range of images, None while the replica is made ready."""

    reference: object
    indices: range | None
    began: float = field(default_factory=now)


@dataclass
class ReplicaState:
    """A replica's place in the run, which its successors take over, and what was done there.

    place: where its process is, None while there is none. process: that one, if it is on this machine. busy_s: seconds
    it worked on ranges that it brought back.
    """

    number: int
    share: Share
    actor: object = None
    place: Place | None = None
    process: psutil.Process | None = None
    host: str = ""
    cores: list[int] = field(default_factory=list)
    threads: int = 0
    precision_ran: dict[str, float] = field(default_factory=dict)
    ready: bool = False
    tasks: deque[Task] = field(default_factory=deque)
    lost: int = 0
    images: int = 0
    ranges: int = 0
    busy_s: float = 0.0
    peak_memory_bytes: int = 0

    @property
    def pid(self) -> int | None:
        """Of its process on its machine; None while it is being started."""
        return self.place and self.place.pid

    @property
    def images_per_s(self) -> float:
        return self.images / self.busy_s if self.busy_s else 0.0

    def brought_back(self, shard: Shard) -> None:
        """Count a range that it did."""
        self.images += len(shard.indices)
        self.ranges += 1
        self.busy_s += shard.wall_s
        self.peak_memory_bytes = shard.peak_memory_bytes

    def forget_run(self) -> None:
        """Begin to count anew."""
        self.images, self.ranges, self.busy_s, self.lost = 0, 0, 0.0, 0

    def record(self, wall_s: float) -> dict:
        """Of a run that took ``wall_s``: its machine and cores, images and ranges that it brought back, ``busy_s``
        (working on those), ``idle_s`` (the rest of ``wall_s``: waiting, being replaced, or working on what was lost),
        ``images_per_s`` (over ``busy_s``), the precision that ran there, its process's peak memory."""
        own = ("host", "cores", "images", "ranges", "busy_s", "idle_s", "images_per_s", "precision_ran")
        found = vars(self) | {"images_per_s": self.images_per_s, "idle_s": wall_s - self.busy_s}
        return {"replica": self.number} | {name: found[name] for name in (*own, "peak_memory_bytes", "lost")}


ATTEMPTS = 3  # of one range, or of starting one replica; then something is wrong that a restart does not cure
DEADLINE_S = 300.0
SLOWER = 10  # times a range may take what the replica's rate says, before it counts as hung
PLACED_S = 60.0  # for all to get a process; 10 s each where there are more than six
GOING_S = 3.0
PREPARING = 6  # deadlines that a replica may take to be ready: it may have to build the engine


class Replicas(AbstractContextManager):
    """``count`` replicas of an engine, started once, for any number of runs over ``data``.

    ::

        with Replicas(engine, data, 2) as replicas:
            evaluation = evaluate(engine, data, replicas=replicas)

    One replica per device: a GPU each for an engine on CUDA; otherwise a share of each machine's cores, to which its
    process is bound before a runtime is loaded. More replicas than cores share cores.

    Args:
        engine: what ``convert`` made.
        data: the labelled images; on other machines under the same path.
        count: how many.
        cores_each: of each replica; None is an equal share of its machine's.
        ray_address: of an existing cluster ("host:6379", or "auto" on one of its machines), all of whose machines are
            used; None is the Ray that this process has, or one of its own on this machine.
        deadline_s: how long a range of images may take (one batch at first, then about 5 s each) before its replica is
            given up for hung, unless it is so slow that ten times what its rate says is more; give more for a model
            whose single batch takes minutes.
        share: of Ray's CPUs; of several ``Replicas`` that are alive at once, to work by turns, the shares add up to 1
            at most.

    Attributes:
        ray_start_s: seconds that starting or finding Ray took.
        start_s: from then until every replica was ready.
        slots: the replicas.

    Raises:
        VitdemoError: where Ray is not installed or does not answer, and for what a replica lacks.
    """

    def __init__(
        self,
        engine: Engine,
        data: Dataset,
        count: int,
        *,
        cores_each: int | None = None,
        ray_address: str | None = None,
        deadline_s: float = DEADLINE_S,
        share: float = 1.0,
    ):
        at_least_1(replicas=count, cores_each=cores_each)
        if engine.recipe is None:
            raise VitdemoError(f"{engine.info.tag}: replicas build an engine anew, so take one that convert made")
        self.engine, self.data = engine, match_classes(engine.info, data)
        self._address, self._cores_each, self._deadline_s = self.data.address, cores_each, deadline_s
        what = f"{count} replicas" if count > 1 else "a replica"
        print(f"starting Ray and {what}", file=message_stream())
        begin = now()
        self._ray = connect(ray_address)
        self.ray_start_s, begin = now() - begin, now()
        self._job = self._ray.get_runtime_context().get_job_id()
        try:
            recipe = self._ray.put(engine.recipe)
        except self._ray.exceptions.RayError as error:
            raise VitdemoError(f"replicas: Ray has no room for the model ({reason_of(error)})") from None
        self._recipe = [recipe]  # Ray fetches an argument, but not what lies in a list: only who must build does
        self.slots = [ReplicaState(*each) for each in enumerate(place_replicas(self._ray, count, engine.device, share))]
        self._failed: Counter[range | int] = Counter()  # attempts of a range, or in a row by a replica's number
        try:
            for slot in self.slots:
                self._start(slot)
            while not all(slot.ready for slot in self.slots):
                self._attend(None)
        except BaseException:
            self.close()
            raise
        self.start_s = now() - begin

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the replicas. Ray itself goes on for the next ones, until ``stop_ray`` or the end of the process."""
        self._end(self.slots)

    @property
    def pids(self) -> list[int]:
        """The replicas' processes, on their machines."""
        return [slot.pid for slot in self.slots]

    @property
    def threads(self) -> int:
        """CPU threads that a call of the largest replica uses."""
        return max(slot.threads for slot in self.slots)

    @property
    def cores(self) -> int:
        """CPU cores of all replicas together."""
        return len({(slot.host, core) for slot in self.slots for core in slot.cores})

    def __str__(self) -> str:
        hosts = {slot.host for slot in self.slots}
        where = "this machine" if hosts == {socket.gethostname()} else f"{len(hosts)} machines"
        shared = ", which they share" if self.cores < len(self.slots) else ""
        return f"replicas: {len(self.slots)} on {self.cores} cores of {where}{shared}"

    def summary(self, schedule: str, wall_s: float) -> dict:
        """Who did how much in the last run.

        Args:
            schedule: its name.
            wall_s: seconds that the run took.

        Returns:
            ``count``, ``schedule``; ``lost``: replicas that died or hung and were replaced; ``ray_start_s``,
            ``start_s``: starting Ray, and the replicas, in no rate; ``each``: by replica, see ``ReplicaState.record``.
        """
        started = {"ray_start_s": self.ray_start_s, "start_s": self.start_s}
        lost = sum(slot.lost for slot in self.slots)
        each = [slot.record(wall_s) for slot in self.slots]
        return {"count": len(each), "schedule": schedule, "lost": lost, **started, "each": each}

    def run(self, images: int, schedule: Schedule, **how: Any) -> Iterator[Shard]:
        """The rows of every image exactly once, a shard for each range, as they come back.

        Args:
            images: how many ``schedule`` holds.
            schedule: who does which when.
            how: what ``Replica.run`` takes besides.

        Raises:
            EngineFailure: when an engine breaks.
            VitdemoError: when replicas are lost again and again.
        """
        self._check_ray()
        self._failed.clear()
        for slot in self.slots:
            slot.forget_run()
            if slot.actor is None:
                self._start(slot)
        left = images
        try:
            while left:
                for slot in filter(lambda slot: slot.ready, self.slots):
                    self._hand_out(slot, schedule, how)
                for shard in self._attend(schedule):
                    schedule.done(shard.indices)
                    left -= len(shard.indices)
                    yield shard
        finally:
            # Stopped half-way: what they still do is for nobody, and one that did not start may never.
            stopped = left > 0
            self._end([s for s in self.slots if any(task.indices for task in s.tasks) or stopped and not s.ready])

    def _check_ray(self) -> None:
        if not self._ray.is_initialized() or self._ray.get_runtime_context().get_job_id() != self._job:
            raise VitdemoError("replicas: the Ray that they were started on was stopped; start others")

    def step(self, device_batch_size: int) -> float:
        """Time one batch of random pixels on every replica, handed out one right after the other.

        Args:
            device_batch_size: images of each.

        Returns:
            Seconds until the last one is done.

        Raises:
            VitdemoError: when a replica is lost.
        """
        self._check_ray()
        begin = now()
        calls = [slot.actor.call.remote(device_batch_size) for slot in self.slots]
        try:
            self._ray.get(calls, timeout=self._deadline_s)
        except self._ray.exceptions.RayTaskError as error:
            raise VitdemoError(f"a replica failed: {reason_of(error.cause)}") from None
        except self._ray.exceptions.RayError as error:
            raise VitdemoError(f"a replica was lost: {loss_of(error)}") from None
        return now() - begin

    def _hand_out(self, slot: ReplicaState, schedule: Schedule, how: dict) -> None:
        while len(slot.tasks) < schedule.ahead and (indices := schedule.take(slot.number, slot.images_per_s)):
            slot.tasks.append(Task(slot.actor.run.remote(slot.number, indices, **how), indices))

    def _attend(self, schedule: Schedule | None) -> list[Shard]:
        """Wait until something happened, and do what it asks for; the ranges that were brought back."""
        heads = {slot.tasks[0].reference: slot for slot in self.slots if slot.tasks}
        self._ray.wait(list(heads), timeout=min(1.0, self._deadline_s / 4))  # for one, then all that are there
        happened, _ = self._ray.wait(list(heads), num_returns=len(heads), timeout=0)
        shards = [shard for reference in happened if (shard := self._collect(heads[reference], schedule))]
        for slot in filter(lambda slot: slot.tasks, self.slots):
            if now() - slot.tasks[0].began > (patience := self._patience_s(slot)):
                if slot.place is None:
                    raise VitdemoError(
                        f"replica {slot.number}: Ray gave it no process in {patience:.0f} s; `ray status` says who has "
                        "the CPUs and GPUs"
                    )
                self._replace(slot, schedule, f"did not answer for {patience:.0f} s, see deadline_s")
        return shards

    def _patience_s(self, slot: ReplicaState) -> float:
        """How long its first task may take."""
        if slot.place is None:
            return max(PLACED_S, 10.0 * len(self.slots))
        if slot.ready and slot.images_per_s:
            return max(self._deadline_s, SLOWER * len(slot.tasks[0].indices) / slot.images_per_s)
        return self._deadline_s * (1 if slot.ready else PREPARING)

    def _collect(self, slot: ReplicaState, schedule: Schedule | None) -> Shard | None:
        """Take what a slot's first task gave."""
        try:
            answer = self._ray.get(slot.tasks[0].reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, VitdemoError | EngineFailure):
                raise error.cause from None
            raise VitdemoError(f"replica on {slot.host or 'a machine'}: {reason_of(error.cause)}") from None
        except self._ray.exceptions.RayError as error:
            self._replace(slot, schedule, loss_of(error))
            return None
        slot.tasks.popleft()
        if slot.tasks:
            slot.tasks[0].began = now()
        if isinstance(answer, Shard):
            slot.brought_back(answer)
            self._failed[slot.number] = 0
            return answer
        if isinstance(answer, Place):
            self._place(slot, answer)
        else:
            (slot.threads, slot.precision_ran), slot.ready = answer, True
        return None

    def _start(self, slot: ReplicaState) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        share = slot.share
        where = NodeAffinitySchedulingStrategy(share.node, soft=True)  # another one where that is gone
        options = dict(num_cpus=share.cpus, num_gpus=share.gpus, scheduling_strategy=where)
        slot.actor = self._ray.remote(Replica).options(**options).remote(share.number, share.count, self._cores_each)
        calls = (
            slot.actor.place.remote(),
            slot.actor.prepare.remote(self.engine.recipe.ticket(), self._recipe, self._address),
        )
        slot.tasks.extend(Task(call, None) for call in calls)

    def _place(self, slot: ReplicaState, place: Place) -> None:
        """A replica has got its process."""
        if different := [name for name, version in installed().items() if place.installed.get(name) != version]:
            raise VitdemoError(f"replica on {place.host}: has another {', '.join(different)}; install the same")
        slot.place, slot.host, slot.cores = place, place.host, place.cores
        if place.node == self._ray.get_runtime_context().get_node_id():
            with suppress(psutil.NoSuchProcess):
                slot.process = psutil.Process(place.pid)

    def _replace(self, slot: ReplicaState, schedule: Schedule | None, reason: str) -> None:
        """End a slot's replica, hand its ranges to others, and start a successor."""
        first = slot.tasks[0].indices
        self._failed.update({first or slot.number, slot.number})
        slot.lost += 1
        if max(self._failed[first], self._failed[slot.number]) >= ATTEMPTS:
            what = f"doing images {first.start} to {first.stop - 1}" if first else "starting"
            raise VitdemoError(f"replica {slot.number} was lost {ATTEMPTS} times, last while {what}: {reason}")
        for task in slot.tasks:
            if task.indices is not None:
                schedule.give_back(task.indices, slot.number)
        tqdm.write(f"replica {slot.number} was lost ({reason}); a successor is starting", file=message_stream())
        self._end([slot])
        self._start(slot)

    def _end(self, slots: list[ReplicaState]) -> None:
        """End the replicas of these slots, and wait until they are gone, as far as they are on this machine."""
        processes = [slot.process for slot in slots if slot.process]
        for slot in slots:
            if slot.actor is not None and self._ray.is_initialized():
                self._ray.kill(slot.actor)
            slot.actor, slot.place, slot.process, slot.ready = None, None, None, False
            slot.tasks.clear()
        for stuck in psutil.wait_procs(processes, timeout=GOING_S)[1]:  # a stopped process does not hear Ray
            with suppress(psutil.NoSuchProcess):
                stuck.kill()
