"""Which replica answers while not all of a deployment hold the same versions: one of those that the call names.

Serve's own router takes the less busy of any two replicas; in the middle of a rolling swap that is the one that has let
the version go, every time where there are two. Calls name replicas in their argument `among`; replicas ignore it.
"""

from __future__ import annotations

import random

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica


class VersionRouter(FIFOMixin, RequestRouter):
    """The less busy of two replicas, drawn from those that the call names; from all, if it names none that runs.

    All calls for one HTTP request have one id, by which `RequestRouter` alone tells calls apart: of two at a time one
    would wait for ever. With `FIFOMixin` a choice may fall to another call; a replica that hasn't its version says so,
    and the door calls again.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Called by Serve for each call, again and again until one of those chosen takes it."""
        names: frozenset[str] = frozenset()
        if pending_request is not None:
            names = pending_request.kwargs.get("among", names)
            pending_request.routing_context.should_backoff = True  # or Serve would ask again without a pause
        among = [one for one in candidate_replicas if one.replica_id.to_full_id_str() in names] or candidate_replicas
        return [random.sample(among, min(2, len(among)))]
