"""The calls (RPCs) of the service: receive and check a request, compute in turn, reply. No torch here.

All calls run in one event loop; compute runs in the scheduler's one thread. Each call is an async generator of its
reply messages. Errors become status codes in one place (`_served`).
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from contextlib import aclosing, nullcontext
from functools import partial
from math import prod
from typing import Any

import grpc
import grpc.aio

from hosl.core.targets import states_shape
from hosl.errors import AccessError, CheckpointError, HoslError, LimitError, LinkError, WireError
from hosl.service.access import Access, bearer
from hosl.service.giving import Giving
from hosl.service.hosted_half import HostedBank
from hosl.service.incoming import Incoming, Room
from hosl.service.limits import HELLO_CALLS, Limits, Meterage
from hosl.service.rounds import Contribution, Round
from hosl.service.runs import OwnQuestion, Question, ServedRun, losses_together, steps_together
from hosl.service.scheduler import CALL_TOKENS, HELLO_TOKENS, Scheduler
from hosl.service.sessions import Session, Sessions
from hosl.service.status import Status
from hosl.service.texts import Texts
from hosl.transport.channel import SERVICE
from hosl.transport.status import ERROR_KEY, code_of
from hosl.wire import hosl_pb2 as pb
from hosl.wire.targets import positions_from_message, targets_from_message
from hosl.wire.tensors import CHUNK_BYTES, WireArray, pack
from hosl.wire.updates import check_update

_LARGEST_NUMBER_BYTES = 4
"""Of a number of a state or its gradient: float32."""
_Call = Callable[["Calls", str, Incoming], AsyncIterator[Any]]


class Calls:
    """The handlers of all calls, for all clients."""

    def __init__(
        self,
        access: Access,
        sessions: Sessions,
        scheduler: Scheduler,
        status: Status,
        limits: Limits,
        *,
        idle_s: float,
        giving: Giving | None = None,
    ) -> None:
        """`giving`: the halves that are given away; None: none is, and none is taken."""
        self._giving = giving
        self._access, self._sessions, self._scheduler = access, sessions, scheduler
        self._status, self._limits, self._idle_s = status, limits, idle_s
        self._meterage = Meterage(limits)
        self.room = Room(limits.tensor_total_bytes)
        self._texts = Texts(sessions, scheduler, status, limits)
        self._closing: dict[Round, asyncio.Task[None]] = {}
        """The task that closes each open round; no call's own, so that it outlives the client that began it."""
        self.round_closed = asyncio.Condition()

    def handler(self) -> grpc.GenericRpcHandler:
        """The handler for a gRPC server: every call by its name, with messages in raw bytes."""
        calls: dict[str, _Call] = {
            "Hello": Calls._hello, "Losses": Calls._losses, "Scores": Calls._scores, "Gradient": Calls._gradient,
            "Probe": Calls._probe, "Step": Calls._step, "Descend": Calls._descend, "Journal": Calls._journal,
            "Save": Calls._save, "States": Calls._states, "StepStates": Calls._step_states, "Leave": Calls._leave,
            "Generate": Calls._generate, "Half": Calls._half, "Give": Calls._give,
        }  # fmt: skip
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                name: grpc.stream_stream_rpc_method_handler(self._served(name, call))
                for name, call in calls.items()
            },
        )

    def _served(self, name: str, call: _Call) -> Callable[[Any, Any], AsyncIterator[bytes]]:
        """A call as gRPC runs it: authenticated, metered, and with its errors turned into status codes."""

        async def serve(frames: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            client = "?"
            try:
                token = bearer(dict(context.invocation_metadata() or ()).get("authorization", ""))
                client = self._access.client_of(token)

                def check_access() -> None:
                    _check_same(self._access.client_of(token), client)

                calls = HELLO_CALLS if name in ("Hello", "Half") else 1
                with self._meterage.call(client, calls), self._status.call(client, name):
                    incoming = Incoming(
                        aiter(frames), idle_s=self._idle_s, check_access=check_access, room=self.room,
                        client=client,
                    )  # fmt: skip
                    try:
                        async for reply in call(self, client, incoming):
                            check_access()  # it may have waited for a round meanwhile
                            data = reply.SerializeToString()
                            self._status.transferred(client, up=incoming.received_bytes, down=len(data))
                            incoming.received_bytes = 0
                            yield data
                    finally:
                        incoming.give_back()
                        self._status.transferred(client, up=incoming.received_bytes, down=0)
            except HoslError as error:
                self._status.refused(client, name, error)
                context.set_trailing_metadata(((ERROR_KEY, type(error).__name__),))
                await context.abort(code_of(error), " ".join(str(error).split()))
            except (asyncio.CancelledError, grpc.aio.AbortError, GeneratorExit):
                raise
            except Exception as error:  # a bug of the server: logged with its trace; other calls go on
                self._status.broke(client, name, error)
                context.set_trailing_metadata(((ERROR_KEY, "FailureError"),))
                await context.abort(
                    grpc.StatusCode.INTERNAL, f"the server failed at {name}: {type(error).__name__}"
                )

        return serve

    async def _hello(self, client: str, incoming: Incoming) -> AsyncIterator[pb.HelloReply]:
        request = await incoming.message(pb.HelloRequest)
        (session, start, run), _ = await self._scheduler.run(
            client, HELLO_TOKENS, lambda: self._sessions.hello(client, request)
        )
        self._status.hello(client, run, request.version, start)
        yield pb.HelloReply(
            session=session,
            start=start,
            limits=self._limits.message(),
            journal_updates=run.updates,
            client=client,
        )

    # ---- calls that change nothing ----

    async def _losses(self, client: str, incoming: Incoming) -> AsyncIterator[pb.LossesReply]:
        request = await incoming.request("losses")
        session = self._sessions.of(client, request.where)
        run = session.run
        arrays, targets = await self._activations(incoming, session, request.activations, request.targets)
        question = Question(client, request.where.step, arrays, targets)
        if (bank := self._sessions.bank(run)) is not None:
            losses, seconds = await self._with_others(run, question, bank, "losses", losses_together)
        else:
            losses, seconds = await self._answered(run, question, _losses_of(run), run.losses)
        _let_go(incoming, arrays)
        yield pb.LossesReply(losses=losses, server_s=seconds)

    async def _probe(self, client: str, incoming: Incoming) -> AsyncIterator[pb.LossesReply]:
        request = await incoming.request("probe")
        session = self._sessions.of(client, request.where)
        if not 0 < request.epsilon < 1:
            raise WireError(f"epsilon must lie between 0 and 1, got {request.epsilon}")
        arrays, targets = await self._activations(incoming, session, request.activations, request.targets)
        if len(arrays) != 2:
            raise WireError(f"a probe has two activations, got {len(arrays)}")

        def work() -> tuple[float, float]:
            session.run.check_now(client, request.where.step)
            return session.run.half.probe(arrays, targets, request.seed, request.epsilon)

        losses, seconds = await self._compute(session, arrays, work)
        _let_go(incoming, arrays)
        yield pb.LossesReply(losses=losses, server_s=seconds)

    async def _scores(self, client: str, incoming: Incoming) -> AsyncIterator[pb.ScoresReply]:
        request = await incoming.request("scores")
        session = self._sessions.of(client, request.where, reads=True)
        arrays, targets = await self._activations(incoming, session, [request.activations], request.targets)

        def work() -> Any:
            session.check_now(request.where.step, evaluation=True)
            return session.run.half.scores(arrays[0], targets)

        scores, seconds = await self._compute(session, arrays, work)
        _let_go(incoming, arrays)
        values = scores.astype("<f4").tobytes()
        yield pb.ScoresReply(rows=scores.shape[0], scores=scores.shape[1], values=values, server_s=seconds)

    async def _gradient(self, client: str, incoming: Incoming) -> AsyncIterator[pb.StepReply]:
        request = await incoming.request("gradient")
        session = self._sessions.of(client, request.where)
        arrays, targets = await self._activations(incoming, session, [request.activations], request.targets)

        def work() -> Any:
            session.run.check_now(client, request.where.step)
            return session.run.half.gradient(arrays[0], targets)

        stepped, seconds = await self._compute(session, arrays, work)
        _let_go(incoming, arrays)
        for reply in _step_replies(stepped, seconds):
            yield reply

    async def _states(self, client: str, incoming: Incoming) -> AsyncIterator[pb.StatesReply]:
        request = await incoming.request("states")
        session = self._sessions.of(client, request.where, reads=True)
        arrays, positions = await self._activations(incoming, session, request.activations, request.positions)
        await incoming.end()

        def work() -> list[WireArray]:
            session.check_now(
                request.where.step, evaluation=request.where.step == session.run.steps.get(client)
            )
            return session.run.half.states(arrays, positions)

        states, seconds = await self._compute(session, arrays, work)
        _let_go(incoming, arrays)
        packed = [pack(array, "none") for array in states]
        yield pb.StatesReply(done=pb.StatesDone(states=[p.header for p in packed], server_s=seconds))
        for tensor in packed:
            for chunk in tensor.chunks():
                yield pb.StatesReply(chunk=chunk)

    async def _generate(self, client: str, incoming: Incoming) -> AsyncIterator[pb.GenerateReply]:
        async for reply in self._texts.generate(client, incoming):
            yield reply

    # ---- calls that change the server, once per (client, step) ----

    async def _step(self, client: str, incoming: Incoming) -> AsyncIterator[pb.StepReply]:
        request = await incoming.request("step")
        session = self._sessions.of(client, request.where)
        run = session.run
        arrays, targets = await self._activations(incoming, session, [request.activations], request.targets)
        question = Question(client, request.where.step, arrays, targets, request.want_gradient)
        if (bank := self._sessions.bank(run)) is not None:
            stepped, seconds = await self._with_others(run, question, bank, "steps", steps_together)
        elif run.round is None:
            stepped, seconds = await self._compute(
                session, arrays, lambda: run.step_together([question])[0], changes=run
            )
        else:
            stepped, seconds = await self._answered(run, question, _parts_of(run), run.step_together)
        _let_go(incoming, arrays)
        self._status.stepped(session.run, client)
        for reply in _step_replies(stepped, seconds):
            yield reply

    async def _step_states(self, client: str, incoming: Incoming) -> AsyncIterator[pb.StepStatesReply]:
        request = await incoming.request("step_states")
        session, step = self._sessions.of(client, request.where), request.where.step
        arrays, positions = await self._activations(
            incoming, session, [request.activations], request.positions, gradient=True
        )
        run = session.run
        in_turn = run.turn.taken(run.training.grace_s) if run.takes_turns else nullcontext()
        async with in_turn:  # not over the reply, which may be read slowly
            (states, update), forward_s = await self._compute(
                session, arrays, lambda: run.states_for_step(client, step, arrays[0], positions)
            )
            packed = pack(states, "none")
            yield pb.StepStatesReply(states=packed.header)
            for chunk in packed.chunks():
                yield pb.StepStatesReply(chunk=chunk)
            gradient = await incoming.tensor(packed.header, tensor_bytes=self._limits.tensor_bytes)
            await incoming.end()
            stepped, backward_s = await self._compute(
                session, arrays, lambda: update(gradient, request.want_gradient), changes=run
            )
        _let_go(incoming, arrays)
        self._status.stepped(session.run, client)
        for reply in _step_replies(stepped, forward_s + backward_s):
            yield (
                pb.StepStatesReply(done=reply.done)
                if reply.WhichOneof("part") == "done"
                else pb.StepStatesReply(chunk=reply.chunk)
            )

    async def _descend(self, client: str, incoming: Incoming) -> AsyncIterator[pb.DescendReply]:
        request = await incoming.message(pb.DescendRequest)
        await incoming.end()
        session = self._sessions.of(client, request.where)
        check_update(request.seeds, request.coefficients)
        _, seconds = await self._compute(
            session,
            [],
            lambda: session.run.descend(client, request.where.step, request.seeds, request.coefficients),
            tokens=CALL_TOKENS * len(request.seeds),
            changes=session.run,
        )
        self._status.stepped(session.run, client)
        yield pb.DescendReply(server_s=seconds)

    async def _save(self, client: str, incoming: Incoming) -> AsyncIterator[pb.SaveReply]:
        request = await incoming.message(pb.SaveRequest)
        await incoming.end()
        session = self._sessions.of(client, request.where)

        def work() -> int:
            session.run.check_now(client, request.where.step, evaluation=True)
            try:
                return self._sessions.save(session.run, asked=True)
            except OSError as cause:  # such as too many open files: the client tries again
                raise CheckpointError(
                    f"run {session.run.name} could not be saved: {cause.strerror}"
                ) from cause

        step, _ = await self._compute(session, [], work, tokens=HELLO_TOKENS)
        yield pb.SaveReply(step=step)

    async def _leave(self, client: str, incoming: Incoming) -> AsyncIterator[pb.LeaveReply]:
        request = await incoming.message(pb.LeaveRequest)
        await incoming.end()
        self._sessions.leave(client, request.where)
        yield pb.LeaveReply()

    # ---- halves that are given away ----

    async def _half(self, client: str, incoming: Incoming) -> AsyncIterator[pb.HalfReply]:
        async with aclosing(self._given_away().down(client, incoming)) as replies:
            async for reply in replies:
                yield reply

    async def _give(self, client: str, incoming: Incoming) -> AsyncIterator[pb.GiveReply]:
        async with aclosing(self._given_away().up(client, incoming)) as replies:
            async for reply in replies:
                yield reply

    def _given_away(self) -> Giving:
        if self._giving is None:
            raise AccessError("this server neither gives a half away nor takes one")
        return self._giving

    # ---- shared halves and rounds ----

    async def _journal(self, client: str, incoming: Incoming) -> AsyncIterator[pb.JournalReply]:
        request = await incoming.message(pb.JournalRequest)
        await incoming.end()
        session = self._sessions.of(client, request.where)
        run, step = session.run, request.where.step
        check_update(request.seeds, request.scales)
        if request.seeds and not request.examples:
            raise WireError(
                f"an update of {len(request.seeds)} directions comes from no examples; it needs one"
            )
        if run.round is not None and request.examples:
            await self._take_part(run, client, request)
        elif run.round is None:
            await self._compute(session, [], lambda: run.submit(client, step, request.seeds, request.scales))
        (updates, now), _ = await self._compute(
            session, [], lambda: (run.updates_after(request.have), run.steps.get(client, 0))
        )
        late = run.round is not None and request.examples > 0 and now != step
        reply = pb.JournalReply(step=now, late=late)
        for update in updates:
            if reply.ByteSize() + update.ByteSize() > CHUNK_BYTES:
                yield reply
                reply = pb.JournalReply(step=reply.step, late=late)
            reply.updates.append(update)
        yield reply

    async def _take_part(self, run: ServedRun, client: str, request: pb.JournalRequest) -> None:
        """Contribute to the round, unless this part was counted before, and wait until it is closed."""
        contribution = Contribution(tuple(request.seeds), tuple(request.scales), request.examples)
        current, _ = await self._scheduler.run(
            client, CALL_TOKENS, lambda: run.contribute(client, request.where.step, contribution)
        )
        if current is None:
            return
        if current.complete:
            self._close_after(0.0, run, current)
        elif current not in self._closing:
            self._close_after(run.grace_s, run, current)
        async with self.round_closed:
            await self.round_closed.wait_for(lambda: run.round is not current)

    def _close_after(self, seconds: float, run: ServedRun, current: Round) -> None:
        """Let a task of the service close the round, in place of the one that waits to do so."""

        async def close() -> None:
            await asyncio.sleep(seconds)
            self._status.closing_round()
            try:
                dropped, _ = await self._scheduler.run(
                    "round", 0, lambda: run.close_round(current), holds_back=_kinds_of(run)
                )
                self._status.round_closed(run, current.number, dropped or [])
            except HoslError as error:
                self._status.refused("round", "close", error)
            self._closing.pop(current, None)
            async with self.round_closed:
                self.round_closed.notify_all()

        if run.round is current:  # else its task is about to tell those who wait
            if current in self._closing:
                self._closing.pop(current).cancel()
            self._closing[current] = asyncio.create_task(close())

    # ---- shared by the calls ----

    async def _activations(
        self,
        incoming: Incoming,
        session: Session,
        headers: Any,
        targets: pb.Targets | pb.Positions,
        *,
        gradient: bool = False,
    ) -> tuple[list[WireArray], Any]:
        """The activations of a request and its targets or positions, checked against each other and the half.

        `gradient`: whether states go out and their gradient follows, for which room is made as well.
        """
        if not 1 <= len(headers) <= 2:
            raise WireError(f"a request carries one or two activations, got {len(headers)}")
        shape = tuple(headers[0].shape)
        same = all(tuple(header.shape) == shape for header in headers)
        if not same or len(shape) != 3 or min(shape) < 1:  # before anything is reshaped by it
            raise WireError(
                f"the activations of a request have one shape [rows, seq, width], each at least 1, got {list(shape)}"
            )
        has_labels = isinstance(targets, pb.Targets)
        parsed: Any = (
            targets_from_message(targets, shape) if has_labels else positions_from_message(targets, shape)
        )
        logits = session.run.half.check(shape, parsed)
        most = self._limits.logits_per_tensor * self._limits.tensor_bytes
        if logits > most:
            raise LimitError(
                f"the logits of {shape[0]} rows at these positions take {logits} bytes; the limit is {most}: send "
                "fewer rows, or raise the server's --tensor-limit"
            )
        states = prod(states_shape(parsed, shape[2])) if gradient else 0
        arrays = await incoming.tensors(
            headers, tensor_bytes=self._limits.tensor_bytes, beside_bytes=2 * states * _LARGEST_NUMBER_BYTES
        )
        if has_labels:  # without labels a gradient may follow, in StepStates
            await incoming.end()
        return arrays, parsed

    async def _compute(
        self,
        session: Session,
        arrays: list[WireArray],
        work: Callable[[], Any],
        *,
        tokens: int = 0,
        changes: ServedRun | None = None,
    ) -> tuple[Any, float]:
        """The result of `work` in the compute thread and its seconds; costs `tokens`, the arrays', or `CALL_TOKENS`.

        `changes`: the run whose half it updates.
        """
        of_arrays = _tokens_of(arrays)
        worked = await self._scheduler.run(
            session.client,
            max(CALL_TOKENS, tokens, of_arrays),
            work,
            holds_back=() if changes is None else _kinds_of(changes),
        )
        self._status.computed(of_arrays)
        return worked

    async def _answered(
        self,
        run: ServedRun,
        question: Question,
        kind: Hashable,
        answer: Callable[[Sequence[Question]], Sequence[Any]],
    ) -> tuple[Any, float]:
        """The run's answer to a question and its seconds; with those of its other clients, if there can be any."""
        # one client's is never merged, so that its run has the bits that it has in one process
        return await self._merged(question, None if run.alone else kind, question, answer)

    async def _with_others(
        self, run: ServedRun, question: Question, bank: HostedBank, kind: str, answer: Callable[..., Any]
    ) -> tuple[Any, float]:
        """The answer of a client's own half and its seconds; computed with what others ask of theirs meanwhile."""
        found, seconds = await self._merged(
            question, (kind, id(bank)), OwnQuestion(run, question), partial(answer, bank)
        )
        if isinstance(found, HoslError):
            raise found
        return found, seconds

    async def _merged(
        self, question: Question, kind: Hashable, asked: Any, answer: Callable[..., Any]
    ) -> tuple[Any, float]:
        """The answer to `asked`, which is `question` as `answer` takes it, and its seconds."""
        tokens = _tokens_of(question.activations)
        worked = await self._scheduler.run_merged(question.client, tokens, kind, asked, answer)
        self._status.computed(tokens)
        return worked


def _tokens_of(arrays: Sequence[WireArray]) -> int:
    return sum(array.data.shape[0] * array.data.shape[1] for array in arrays)


def _losses_of(run: ServedRun) -> Hashable:
    """The kind of questions that ask for losses at a run's weights."""
    return "losses", id(run)


def _parts_of(run: ServedRun) -> Hashable:
    """The kind of those that add to the gradient of a run's round."""
    return "parts", id(run)


def _kinds_of(run: ServedRun) -> tuple[Hashable, ...]:
    """The kinds that are asked of a run's weights as they are."""
    return _losses_of(run), _parts_of(run)


def _let_go(incoming: Incoming, arrays: list[WireArray]) -> None:
    """Make room before a reply that may be read slowly."""
    arrays.clear()
    incoming.give_back()


def _step_replies(stepped: Any, seconds: float) -> list[pb.StepReply]:
    if stepped.gradient is None:
        return [pb.StepReply(done=pb.StepDone(loss=stepped.loss, server_s=seconds))]
    packed = pack(stepped.gradient, "none")
    done = pb.StepDone(loss=stepped.loss, gradient=packed.header, server_s=seconds)
    return [pb.StepReply(done=done), *(pb.StepReply(chunk=chunk) for chunk in packed.chunks())]


def _check_same(token_client: str, client: str) -> None:
    if token_client != client:  # cannot happen: a token keeps its client
        raise LinkError(f"the call of {client} goes on as {token_client}")
