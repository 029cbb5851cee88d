"""Who may ask a server, and what it tells of itself: keys, addresses, figures."""

import http.client
import json
import re

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.core.errors import AddressError, ExperimentError
from fedge.edge.llm.api.http import app
from fedge.edge.llm.api.http_server import Server
from fedge.edge.llm.api.metrics import Histogram
from tests.llm_server import NAME, ON, call, is_error, served

# ---- Who may ask ---------------------------------------------------------------------------------------------------


def test_a_key_is_asked_of_everybody_but_for_health(tmp_path):
    with served(tmp_path, api_key="s3cret") as live:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}):
            for method, path in (
                ("GET", "/v1/models"),
                ("GET", "/metrics"),
                ("POST", "/v1/completions"),
                ("GET", "/x"),
            ):
                status, seen, answer = call(live, method, path, headers=headers)
                assert (status, is_error(status, answer)) == (401, True)
                assert seen["www-authenticate"] == "Bearer"
        assert call(live, "GET", "/health", headers={"Host": "device.local"})[0] == 200
        with openai.OpenAI(
            base_url=live.url + "/v1", api_key="wr\u00f6ng".encode("latin-1").decode("ascii", "replace")[:2]
        ) as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                client.models.list()
            assert caught.value.code == "invalid_api_key"
        with openai.OpenAI(base_url=live.url + "/v1", api_key="s3cret") as client:
            assert client.models.list().data[0].id == NAME


def test_others_reach_a_server_with_a_key_only(tmp_path):
    with served(tmp_path) as live:
        engine, tokenizer = live.engine, live.tokenizer

    def made(key):
        return app(engine, tokenizer, NAME, api_key=key)

    for listen in ("0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.org:0"):
        with pytest.raises(AddressError, match="set an API key, or listen on 127"):
            Server(made(None), listen)
    with Server(made("k"), "0.0.0.0:0") as server:
        assert server.address.startswith("0.0.0.0:")
        with pytest.raises(AddressError, match="cannot be listened on"):
            Server(made("k"), server.address)
    for key in ("", " ", "a b", "k\u00e9y", "a\n"):
        with pytest.raises(ExperimentError, match="API key"):
            made(key)
    with pytest.raises(AddressError, match="host:port"):
        Server(made(None), "localhost")


def test_health_asks_for_no_figures(tmp_path):
    with served(tmp_path) as live:
        live.engine.stats = None
        assert call(live, "GET", "/health")[2] == {"status": "ok", "running": 0, "waiting": 0}


# ---- Figures -------------------------------------------------------------------------------------------------------

LINE = re.compile(r'fedge_llm_[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [-+0-9.e]+')


def test_metrics_are_prometheus_text(tmp_path):
    with served(tmp_path) as live:
        for path in ("/v1/models", "/odd", "/odder"):
            call(live, "GET", path)
        call(live, "POST", "/v1/completions", json.dumps({"model": NAME, "prompt": "a"} | ON))
        stats = live.engine.stats
        live.engine.stats = lambda: stats() | {'memory_file_bytes{rank="0"}': 5.0, 'memory_file_bytes{rank="1"}': 7.0}
        line = http.client.HTTPConnection(live.address, timeout=20)
        line.request("GET", "/metrics")
        response = line.getresponse()
        assert response.getheader("Content-Type").startswith("text/plain; version=0.0.4")
        lines = response.read().decode().splitlines()
        line.close()
    figures = [line for line in lines if not line.startswith("#")]
    assert all(LINE.fullmatch(line) for line in figures), figures
    types = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(set(types)) == len(types)
    for expected in (
        'fedge_llm_http_responses_total{path="other",status="404"} 2',
        "fedge_llm_generated_tokens_total 16",
        'fedge_llm_requests_finished_total{reason="length"} 1',
        "fedge_llm_ttft_seconds_count 1",
        'fedge_llm_tpot_seconds_bucket{le="+Inf"} 1',
        'fedge_llm_memory_file_bytes{rank="1"} 7.0',
    ):
        assert expected in figures


@given(st.lists(st.floats(0, 1e3), max_size=20))
def test_histograms_count_what_is_at_most_each_bound(values):
    histogram = Histogram((0.1, 1.0, 10.0))
    for value in values:
        histogram.add(value)
    lines = [line for line in histogram.lines("x", "X.") if "bucket" in line]
    counts = [int(line.split()[1]) for line in lines]
    assert counts == [sum(value <= bound for value in values) for bound in (0.1, 1.0, 10.0, float("inf"))]
