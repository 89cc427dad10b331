"""A run in which each client has server adapters of its own: each is alone in its part, in any order of calls."""

import asyncio
import json
import shutil
import threading

import pytest

from hosl.cli import main
from hosl.errors import CheckpointError, HandshakeError, LimitError, NonFiniteError, SessionError, StepError
from hosl.service.hosted_half import HostedBank
from hosl.service.operation.live_files import LiveFiles, read_progress
from hosl.service.operation.quota import Quota
from hosl.service.operation.stored import CLIENTS, size_bytes
from hosl.system.checkpoint import checkpoint_steps
from hosl.wire import hosl_pb2 as pb
from hosl.wire.protocol import PERSONAL_PROTOCOL
from tests.unit.hosted import MODEL, CountingHalf, Service, in_loop, training

PERSONAL = training(
    clients=3,
    halves=pb.PERSONAL,
    order=pb.SEQUENTIAL,
    trainable=pb.LORA,
    personal_server=True,
    method=pb.HOSL,
)


class CountingBank(HostedBank):
    """A `HostedBank` of halves that count, which writes down who was answered together."""

    at_once = 2

    def __init__(self):
        self.halves, self.passes, self.ruined = {}, [], ""

    def of(self, client):
        self.halves[client] = CountingHalf()
        return self.halves[client]

    def forget(self, client):
        self.halves.pop(client, None)

    def step_together(self, asked):
        self.passes.append([one.client for one in asked])
        return [
            NonFiniteError("ruined")
            if client == self.ruined
            else self.halves[client].step(one.activations[0], one.targets, step, one.want_gradient)
            for client, one, step in asked
        ]

    def losses_together(self, asked):
        self.passes.append([one.client for one in asked])
        return [self.halves[client].losses(one.activations, one.targets) for client, one, _ in asked]


class Personal(Service):
    """The service over a bank of halves that count."""

    def __init__(self, folder, **how):
        super().__init__(folder, half=CountingBank(), **how)

    async def greeted(self, client, *, protocol=PERSONAL_PROTOCOL, **more):
        settings = {"model": MODEL, "training": PERSONAL, "restorable": (0,), "run": "run"} | more
        (reply,) = await self.call("_hello", client, pb.HelloRequest(protocol=protocol, **settings))
        return reply


def test_each_client_counts_its_own_steps_and_goes_back_by_itself(tmp_path):
    async def work():
        service = Personal(tmp_path)
        ann, bob = [(await service.greeted(client)).session for client in ("ann", "bob")]
        assert [await service.step("ann", ann, step) for step in (1, 2, 3)] == [1.0, 2.0, 3.0]
        assert await service.step("bob", bob, 1) == 1.0
        with pytest.raises(StepError, match="waits for step 2"):
            await service.step("bob", bob, 4)
        assert await service.save("ann", ann, 3) == 3
        assert await service.save("bob", bob, 1) == 1
        assert await service.step("bob", bob, 2) == 2.0
        again = await service.greeted("bob", restorable=(0, 1), current=1)  # its step 2 was lost on the way
        assert again.start == 1
        assert service.half.halves["bob"].updates == 1
        assert service.half.halves["ann"].updates == 3  # nobody else goes back
        return {client: service.sessions.runs[f"run/{client}"].steps for client in ("ann", "bob")}

    assert in_loop(work()) == {"ann": {"ann": 3}, "bob": {"bob": 1}}
    saved = {
        c: checkpoint_steps(tmp_path / "runs" / "run" / CLIENTS / c / "checkpoints") for c in ("ann", "bob")
    }
    assert saved == {"ann": [3], "bob": [1]}


def test_a_new_process_goes_on_with_each_client_where_it_was(tmp_path):
    async def before():
        service = Personal(tmp_path)
        for client, steps in (("ann", 3), ("bob", 1)):
            session = (await service.greeted(client)).session
            for step in range(1, steps + 1):
                await service.step(client, session, step)
            await service.save(client, session, steps)

    async def after():
        service = Personal(tmp_path)
        starts = [
            (await service.greeted(client, restorable=(0, steps))).start
            for client, steps in (("bob", 1), ("ann", 3))
        ]
        return starts, {client: half.updates for client, half in service.half.halves.items()}

    in_loop(before())
    assert in_loop(after()) == ([1, 3], {"bob": 1, "ann": 3})


def test_an_older_peer_is_refused_and_not_misunderstood(tmp_path):
    async def work():
        service = Personal(tmp_path)
        with pytest.raises(HandshakeError, match="speaks protocol 2, the client 1"):
            await service.greeted("ann", protocol=1)
        # what a server that knows one protocol alone says of the other
        with pytest.raises(HandshakeError, match="speaks protocol 1, the client 2"):
            await service.greeted("ann", training=training(), protocol=2)
        await service.greeted("ann")
        with pytest.raises(HandshakeError, match="personal_server = True, this client False"):
            await service.hello("bob", training(**_plain()))
        assert list(service.sessions.runs) == ["run/ann"]

    def _plain():
        named = {field.name: getattr(PERSONAL, field.name) for field in PERSONAL.DESCRIPTOR.fields}
        return {
            name: value
            for name, value in named.items()
            if name not in ("personal_server", "lora", "optimiser")
        }

    in_loop(work())


@pytest.mark.parametrize(
    "changed",
    [
        {"trainable": pb.ALL},
        {"method": pb.FO_ZO},
        {"order": pb.SYNCHRONOUS},
        {"halves": pb.SHARED},
        {"clients": 1},
    ],
    ids=str,
)
def test_settings_that_do_not_go_with_it_are_refused(tmp_path, changed):
    refused = pb.Training()
    refused.CopyFrom(PERSONAL)
    for name, value in changed.items():
        setattr(refused, name, value)

    async def work():
        with pytest.raises(HandshakeError, match=r"personal_server needs server.trainable: lora"):
            await Personal(tmp_path).greeted("ann", training=refused)

    in_loop(work())
    assert not (tmp_path / "runs" / "run").exists()


def test_steps_that_wait_are_made_in_one_pass_and_errors_stay_with_their_client(tmp_path):
    async def work():
        service = Personal(tmp_path)
        service.scheduler.merge_tokens = 1024
        names = ("ann", "bob", "cem")
        sessions = {client: (await service.greeted(client)).session for client in names}
        service.half.ruined = "bob"
        held = threading.Event()
        busy = asyncio.create_task(service.scheduler.run("owner", 0, held.wait))  # until all wait
        turns = asyncio.gather(
            *(service.step(client, sessions[client], 1) for client in ("ann", *names)), return_exceptions=True
        )
        while service.scheduler.queue < 4:
            await asyncio.sleep(0.01)
        held.set()
        await busy
        first, again, ruined, third = await turns
        assert (first, again, third) == (1.0, 1.0, 1.0)  # the request that came twice has one reply
        assert isinstance(ruined, NonFiniteError)
        assert service.half.passes == [["ann", "bob"], ["cem"]]  # two slots
        service.half.ruined = ""
        assert await service.step("bob", sessions["bob"], 1) == 1.0
        return {name: run.server_step for name, run in service.sessions.runs.items()}

    assert in_loop(work()) == {"run/ann": 1, "run/bob": 1, "run/cem": 1}


def test_a_device_in_the_place_of_a_revoked_one_goes_on_with_its_adapters(tmp_path):
    revoked = set()

    async def work():
        service = Personal(tmp_path, revoked=lambda client: client in revoked)
        sessions = {client: (await service.greeted(client)).session for client in ("ann", "bob", "cem")}
        for step in (1, 2):
            await service.step("bob", sessions["bob"], step)
        await service.save("bob", sessions["bob"], 2)
        with pytest.raises(HandshakeError, match="is for 3 clients"):
            await service.greeted("dee")
        revoked.add("bob")
        heir = await service.greeted("dee", restorable=(0, 2), current=2)
        assert heir.start == 2
        assert await service.step("dee", heir.session, 3) == 3.0
        with pytest.raises(SessionError):
            await service.step("bob", sessions["bob"], 3)
        assert sorted(service.half.halves) == ["ann", "cem", "dee"]

    in_loop(work())
    assert sorted(path.name for path in (tmp_path / "runs" / "run" / CLIENTS).iterdir()) == ["bob", "dee"][1:]


def test_the_parts_of_a_run_make_room_together(tmp_path):
    async def work():
        service = Personal(tmp_path)
        sessions = {client: (await service.greeted(client)).session for client in ("ann", "bob")}
        await service.step("ann", sessions["ann"], 1)
        for client, session in sessions.items():
            await service.leave(client, session)
        await service.greeted("cem", run="other")
        assert list(service.sessions.runs) == ["other/cem"]
        assert list(service.sessions._banks) == ["other"]

    in_loop(work())
    assert checkpoint_steps(tmp_path / "runs" / "run" / CLIENTS / "ann" / "checkpoints") == [1]


def test_a_client_that_has_left_leaves_memory_when_another_comes(tmp_path):
    async def work():
        service = Personal(tmp_path)
        ann, bob = [(await service.greeted(client)).session for client in ("ann", "bob")]
        await service.step("ann", ann, 1)
        await service.step("bob", bob, 1)
        await service.leave("ann", ann)
        await service.greeted("cem")
        assert sorted(service.half.halves) == ["bob", "cem"]
        return (await service.greeted("ann", restorable=(0, 1), current=1)).start

    assert in_loop(work()) == 1  # it goes on where it was


def test_a_look_is_at_the_client_s_own_adapters(tmp_path):
    async def work():
        service = Personal(tmp_path)
        ann, bob = [(await service.greeted(client)).session for client in ("ann", "bob")]
        for step in (1, 2):
            await service.step("ann", ann, step)
        await service.step("bob", bob, 1)
        looks = [await service.greeted(client, protocol=1, look=True, run="run") for client in ("ann", "bob")]
        return [reply.start for reply in looks]

    assert in_loop(work()) == [2, 1]


def _told(folder, capsys, *words):
    capsys.readouterr()
    assert main(["runs", *words, "--service", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


async def _worked(service, steps, saved):
    """Clients with so many steps each, of which those up to `saved` are in a checkpoint; their sessions."""
    sessions = {client: (await service.greeted(client)).session for client in steps}
    for client, last in steps.items():
        for step in range(1, last + 1):
            await service.step(client, sessions[client], step)
            if step == saved.get(client):
                await service.save(client, sessions[client], step)
    return sessions


def test_hosl_runs_tells_each_client_s_own_steps_and_checkpoints(tmp_path, capsys):
    async def work():
        service = Personal(tmp_path)
        sessions = await _worked(service, {"ann": 3, "bob": 2}, {"ann": 3, "bob": 1})
        await service.leave("ann", sessions["ann"])
        await LiveFiles(tmp_path, service.sessions.now).write()
        (run,) = service.sessions.now()
        return run, _told(tmp_path, capsys, "ls")["runs"], _told(tmp_path, capsys, "show", "run")

    run, (listed,), shown = in_loop(work())
    assert read_progress(tmp_path / "runs" / "run") == run
    assert (run.name, run.step, run.expected, run.present) == ("run", 2, 3, 1)
    assert (run.loss, run.clients["ann"].loss, run.clients["bob"].loss) == (2.0, 3.0, 2.0)
    assert (listed["step"], listed["loss_nats"], listed["present"], listed["in_memory"]) == (2, 2.0, 1, True)
    seats = {seat["name"]: (seat["step"], seat["saved_steps"], seat["present"]) for seat in shown["seats"]}
    assert seats == {"ann": (3, [3], False), "bob": (2, [1], True)}
    saved = {(c["client"], c["step"], c["damage"]) for c in shown["checkpoints"]}
    assert saved == {("ann", 3, None), ("bob", 1, None)}
    assert sum(c["bytes"] for c in shown["checkpoints"]) < shown["disk_bytes"]
    (tmp_path / "running.json").unlink()  # as after an orderly end
    (after,) = _told(tmp_path, capsys, "ls")["runs"]
    assert (after["step"], after["present"], after["in_memory"]) == (1, 0, False)
    assert {seat["name"]: seat["step"] for seat in after["seats"]} == {"ann": 3, "bob": 1}
    state = tmp_path / "runs" / "run" / CLIENTS / "bob" / "checkpoints" / "step-00000001" / "state.json"
    state.write_text(state.read_text().replace('"half": 1', '"half": 2'))
    damages = {c["client"]: c["damage"] for c in _told(tmp_path, capsys, "show", "run")["checkpoints"]}
    assert damages["ann"] is None
    assert "state.json has another digest" in damages["bob"]


def test_after_a_kill_clients_that_are_not_back_are_told_at_their_checkpoints_not_where_they_were(tmp_path):
    async def work():
        killed = Personal(tmp_path)
        await _worked(killed, {"ann": 4, "bob": 3, "cay": 2}, {"ann": 4, "bob": 1})
        await LiveFiles(tmp_path, killed.sessions.now).write()
        again = Personal(tmp_path)
        await again.greeted("ann", restorable=(0, 4), current=4)
        (run,) = again.sessions.now()
        lost = [(await again.greeted("bob", restorable=(0, 1), current=3)).start]
        return run, lost, again.sessions.runs["run/ann"].last_loss

    run, lost, loss = in_loop(work())
    assert {name: client.step for name, client in run.clients.items()} == {"ann": 4, "bob": 1, "cay": 0}
    assert lost == [1]
    assert (run.step, run.clients["bob"].loss, loss) == (0, None, 4.0)
    assert all(client.heard for client in run.clients.values())


def test_a_quota_counts_the_checkpoints_of_every_client_at_the_one_that_began_the_run(tmp_path):
    async def work():
        service = Personal(tmp_path, quota=Quota(runs=1))
        sessions = await _worked(service, {"ann": 2, "bob": 2}, {"ann": 1, "bob": 1})
        one = size_bytes(tmp_path / "runs" / "run" / CLIENTS / "ann" / "checkpoints")
        service.sessions._quota.disk_bytes = 5 * one  # three of one client fit, three of each of two do not
        for client in ("bob", "ann"):
            with pytest.raises(LimitError, match=r"client ann has .* with run run; .* are allowed"):
                await service.save(client, sessions[client], 2)
        service.sessions._quota.disk_bytes = 7 * one
        saved = [await service.save(client, sessions[client], 2) for client in ("bob", "ann")]
        for client, session in sessions.items():
            await service.leave(client, session)
        with pytest.raises(LimitError, match="client ann has begun 1 runs here"):
            await service.greeted("ann", run="second")
        await service.greeted("bob", run="second")  # who began none
        return saved

    assert in_loop(work()) == [2, 2]


def test_a_run_that_cannot_be_opened_leaves_no_base_behind_that_another_would_train(tmp_path):
    async def work():
        service = Personal(tmp_path)
        await _worked(service, {"ann": 1}, {"ann": 1})
        again, opened = Personal(tmp_path), []
        again.sessions._open_half = lambda model, training: opened.append(training) or again.half
        state = tmp_path / "runs" / "run" / CLIENTS / "ann" / "checkpoints" / "step-00000001" / "state.json"
        state.write_text("{")
        with pytest.raises(CheckpointError):
            await again.greeted("ann", restorable=(0, 1), current=1)
        shutil.rmtree(
            tmp_path / "runs" / "run"
        )  # the owner drops it, and the device begins it with other settings
        other = pb.Training()
        other.CopyFrom(PERSONAL)
        other.learning_rate *= 2
        await again.greeted("ann", training=other)
        return [training.learning_rate for training in opened]

    first, second = in_loop(work())
    assert second == 2 * first


def test_a_dropped_run_s_memory_is_let_go_of_by_one_thread_alone(tmp_path):
    async def work():
        service = Personal(tmp_path)
        sessions = await _worked(service, {"ann": 1, "bob": 1}, {})
        (tmp_path / "runs" / "run").rename(tmp_path / "gone")
        dropped = service.sessions.dropped()  # by the compute thread, while the loop hears of both clients
        for client, session in sessions.items():
            with pytest.raises(SessionError, match="say hello again"):
                await service.step(client, session, 2)
        for run in dropped:
            service.sessions._forget(run)
        assert not service.half.halves
        assert not service.sessions.now()

    in_loop(work())


def test_a_step_that_waited_while_its_run_was_let_go_is_asked_again(tmp_path):
    async def work():
        service = Personal(tmp_path)
        session = (await service.greeted("ann")).session
        run = service.sessions.runs["run/ann"]
        service.sessions._forget(run)
        with pytest.raises(SessionError, match="say hello again"):
            run.is_due("ann", 1)
        with pytest.raises(SessionError):
            await service.step("ann", session, 1)
        assert not service.half.halves

    in_loop(work())


def test_the_seat_of_a_silent_client_is_not_anothers_who_would_get_its_adapters(tmp_path):
    async def work():
        service = Personal(tmp_path, seat_s=0.0)
        for client in ("ann", "bob", "cay"):
            await service.greeted(client)
        with pytest.raises(HandshakeError, match="is for 3 clients and has ann, bob, cay"):
            await service.greeted("dan")
        await service.greeted("ann")

    in_loop(work())
