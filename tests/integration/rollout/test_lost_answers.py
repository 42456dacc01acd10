"""The answer to LeasePrompts is lost with its connection: prompts are leased, and no gateway knows of it."""

from __future__ import annotations

from typing import Any

import pytest

from milepost.client.rollout import RolloutClient
from milepost.types import Prompt, PromptState
from relay import Relay
from stack import until

PROMPTS = tuple(f"p{i}" for i in range(4))
LEASE_TTL_S = 12.0
ENDS = (PromptState.READY, PromptState.DROPPED)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_leases_whose_answer_was_lost_are_given_back_before_they_expire(
    driver: Any, engine: Any, start_gateway: Any
) -> None:
    await driver.create(lease_ttl_s=LEASE_TTL_S, max_attempts=1)
    await driver.publish(0, engine)
    async with Relay(driver.buffer.address).serving() as relay:
        _, address = start_gateway(buffer=relay.address, run_id=driver.run_id, router_http=engine.url)
        async with RolloutClient(address) as gateway:

            async def waits_for_prompts() -> bool:
                return "no prompts" in (await gateway.get_status()).waiting_for

            await until("the gateway waits for prompts", waits_for_prompts, within_s=90)
            relay.muted = True
            await driver.feed(*(Prompt(prompt_id=p, text="12+34=", label="046") for p in PROMPTS))
            rows = await driver.until_states(**dict.fromkeys(PROMPTS, PromptState.ROLLING))
            assert {rows[p].attempt for p in PROMPTS} == {1}
            relay.cut()

            rows = await driver.until(lambda rows: all(rows[p].state in ENDS for p in PROMPTS))
            assert {rows[p].state for p in PROMPTS} == {PromptState.READY}, "one expiry and it is dropped"
            assert {(rows[p].attempt, rows[p].failed_attempts) for p in PROMPTS} == {(2, 0)}
            (stats,) = await driver.buffer.get_stats(driver.run_id)
            assert stats.expired_leases == 0
