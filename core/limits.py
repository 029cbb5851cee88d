"""Every limit fedge enforces, by name, in one place. A limit that is not here does not exist.

Owns the defaults; `[deploy.limits]` of an experiment file overrides single fields. Must never hold logic.
"""

from dataclasses import dataclass

# What a data set may claim before its bytes are taken at their word.
MAX_DATASET_BYTES = 16 << 30  # all arrays, unpacked
MAX_DATASET_ARRAYS = 1024
MAX_CLASSES = 1_000_000  # a label as large as a hash is a mistake, and would make as many classes


@dataclass(frozen=True, slots=True)
class Limits:
    """What one peer may cost the other. Sizes in bytes, times in seconds."""

    # One message and one upload.
    chunk_bytes: int = 1 << 18  # 256 KiB to 2 MiB are about as fast; buffers of many uploads hold several chunks each
    max_message_bytes: int = 4 << 20  # gRPC's own default; tensors travel in chunks below it
    max_update_bytes: int = 4 << 30
    max_blobs: int = 64
    max_metadata_items: int = 64  # timings, metrics and hyper-parameters of one task or update
    max_name_bytes: int = 256

    # What an update may claim.
    max_examples: int = 1_000_000_000  # refused above; weighers apply their own, lower, cap
    max_steps: int = 10_000_000
    max_update_norm: float = 1e8  # Euclidean norm of the delta

    # How long things may take.
    lease_s: float = 3600.0  # a task not answered by then is taken from the client
    liveness_s: float = 30.0  # a client not connected for so long has left
    rpc_timeout_s: float = 30.0  # deadline of every unary call
    stream_timeout_s: float = 600.0  # deadline of every streaming call; both ends reopen after it
    keepalive_time_s: float = 20.0
    keepalive_timeout_s: float = 10.0
    min_ping_interval_s: float = 10.0
    max_reconnect_s: float = 30.0

    # How much the coordinator keeps.
    max_clients: int = 10_000
    max_refusals: int = 3  # refused updates in a row before a client is evicted
    max_held_groups: int = 10_000  # in a row, too small for the rule, before the run ends as starved
    max_held_unchanged: int = 1000  # of those, in a row without a row of a new client, once all expected have come
    remembered_tasks: int = 100_000  # ended task ids kept, so that a repeated delivery is recognised
    snapshot_updates: int = 256  # accepted updates between two snapshots in the journal


@dataclass(frozen=True, slots=True)
class EdgeLimits:
    """What a split model, and one device that asks for its tail, may cost. Sizes in bytes, times in seconds."""

    # A model file, before anything of it is used.
    max_model_bytes: int = 64 << 20  # of the graph; weights lie beside it
    max_weights_bytes: int = 16 << 30
    max_nodes: int = 200_000
    max_pieces: int = 512

    # One request.
    max_tensor_bytes: int = 64 << 20  # coded or not
    max_tensors: int = 64
    max_rank: int = 8
    max_deadline_s: float = 60.0
    rpc_timeout_s: float = 10.0
    stream_timeout_s: float = 600.0  # both ends open the next stream after it
    max_probe_bytes: int = 1 << 20

    # What the cloud holds.
    max_streams: int = 1000
    max_queue: int = 256  # requests that wait, all devices together
    max_queue_bytes: int = 256 << 20
    max_unread_bytes: int = 128 << 20  # replies on their way, all devices together; those of one: max_tensor_bytes
    max_in_flight: int = 32  # requests of one device
    max_batch: int = 16
    batch_wait_s: float = 0.002  # how long the first request of a batch waits for others

    # What a machine keeps of optimised pieces, all bundles together.
    max_cache_bytes: int = 8 << 30  # a piece holds its weights once more; what is in use may be above


@dataclass(frozen=True, slots=True)
class LlmLimits:
    """What a language model across devices, and one user of it, may cost. Sizes in bytes, times in seconds."""

    # A model's folder, before anything of it is used.
    max_config_bytes: int = 1 << 20
    max_tokenizer_bytes: int = 64 << 20
    max_template_passes: int = 100_000  # loops and calls of a chat template, for one conversation
    max_template_text: int = 4 << 20  # characters of a chat template, and of what it writes
    max_header_bytes: int = 64 << 20  # of one safetensors file
    max_files: int = 1024
    max_layers: int = 1024
    max_ranks: int = 64

    # Between ranks.
    connect_timeout_s: float = 10.0
    step_timeout_s: float = 30.0  # a rank silent for so long is lost
    max_frame_bytes: int = 256 << 20
    max_step_tokens: int = 512  # of all sequences together in one pass

    # One request, and all of them.
    max_requests: int = 256  # waiting and running
    max_slots: int = 16  # running at a time
    max_new_tokens: int = 4096  # of one request that names no number: as far as the context goes, at most so many
    chunk_tokens: int = 256  # of prompts in one pass while others wait for their next token

    # The control plane of a group of ranks.
    max_report_bytes: int = 1 << 18  # one message of a worker
    max_device_name_bytes: int = 64
    max_certificate_bytes: int = 1 << 14
    beat_s: float = 2.0  # a worker says so often that it is there
    silence_s: float = 20.0  # a worker that says nothing for so long is gone
    settle_s: float = 3.0  # after a rank was lost: how long the others may take to say that they have noticed
    load_timeout_s: float = 1800.0  # to fetch a shard and open it
    rest_s: float = 30.0  # a device that could not load, or not be met, is left out for so long
    useless_s: float = 600.0  # one without which the others are faster, likewise
    form_tries: int = 8  # a group whose devices fail while it is formed
    kernel_s: float = 1.0  # to measure which kernel is the fastest
    fetch_chunk_bytes: int = 1 << 18
    fetch_tries: int = 3  # of a shard, each from where the last one was cut
    reconnect_s: float = 0.1  # a worker's first wait for a head that is away; each is twice as long as the last
    max_reconnect_s: float = 10.0
    max_store_bytes: int = 256 << 30  # of shards in one folder

    # The HTTP server.
    max_body_bytes: int = 1 << 20  # of one request; all connections together may hold so many each
    max_choices: int = 16  # answers of one HTTP request, over all its prompts
    max_connections: int = 512
    http_timeout_s: float = 30.0  # for a head or a body to arrive, and for a client that reads nothing of its answer
    max_idle_s: float = 60.0  # of a connection between two requests
    shutdown_s: float = 5.0  # answers that are under way may take so long when the server ends

    # A cloud that continues what devices begin.
    max_devices: int = 256  # streams at a time; each takes two threads
    max_ask_bytes: int = 4 << 20  # one message of a device
    max_asks: int = 8  # of one device that wait; of all: max_requests
    stream_idle_s: float = 120.0  # a device that says nothing for so long has to open its stream again
    max_guesses: int = 16  # to be verified in one pass
    max_deadline_s: float = 60.0
    max_sessions: int = 4096
    max_device_sessions: int = 64
    max_session_bytes: int = 1 << 30  # states, and keys and values of all positions that are known
    max_context_bytes: int = 8 << 30  # of all sessions
    max_device_bytes: int = 2 << 30  # of all sessions of one device
    session_idle_s: float = 600.0  # a session that says nothing for so long is forgotten
    max_untold: int = 256  # replies that wait for a device to read them
    unread_s: float = 30.0  # a device that reads no reply for so long is cut off
