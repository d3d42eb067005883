from concurrent.futures import ThreadPoolExecutor

import pytest

from arte_edge.runtimes.openai.client import Prices, Usage, UsageMeter


def test_counts_from_many_threads_add_up():
    meter = UsageMeter(Prices(prompt_usd_per_million=1.0, completion_usd_per_million=4.0))

    def count(_):
        meter.request()
        meter.retry()
        meter.tokens(3, 2)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count, range(500)))
    usage = meter.usage
    assert (usage.requests, usage.retries) == (500, 500)
    assert (usage.prompt_tokens, usage.completion_tokens) == (1500, 1000)
    assert usage.cost_usd == pytest.approx((1500 * 1.0 + 1000 * 4.0) / 1e6)


def test_without_prices_nothing_costs():
    meter = UsageMeter()
    meter.tokens(10, 10)
    assert meter.usage == Usage(prompt_tokens=10, completion_tokens=10)
