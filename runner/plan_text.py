"""A plan as plain text, for terminals and log files."""

from __future__ import annotations

from engines import costs
from engines.models.spec import DecoderSpec
from runner.memory import Memory, gb
from runner.plan import Plan
from runner.source.paths import shown_url

TYPICAL_TOKENS = 1024
"""Length of a sequence for "how many fit" where no rows were looked at."""


def render(plan: Plan) -> str:
    settings, config = plan.settings, plan.settings.config
    rows = [
        ("job", f"{plan.job.name}, task {plan.job.task.name}, results in {plan.output_folder}"),
        ("model", _model(plan)),
        ("host", _host(plan)),
        ("engine", _engine(plan)),
        ("dtype", settings.dtype),
        ("length", f"at most {config.max_model_len or '(known once loaded)'} tokens, prompt and output together"),
        ("batch", f"{config.max_num_seqs} sequences, {config.max_num_batched_tokens} new tokens a step"),
        ("input", shown_url(plan.job.dataset.path)),
    ]
    layout = plan.layout
    if layout.num_devices > 1:
        sizes = f"tp {layout.tp}, dp {layout.dp}, ep {layout.ep}"
        sizes += f", prefill {layout.prefill}" if layout.prefill else ""
        spec = plan.spec if isinstance(plan.spec, DecoderSpec) else None
        rows.insert(4, ("parallel", f"{sizes}: {layout.text(spec)}"))
    typical = plan.inspection.typical_tokens if plan.inspection else 0
    for memory in plan.memory:
        rows.append(("memory", _memory(memory, typical)))
    lines = [f"{key:<9} {value}" for key, value in rows]
    lines += ["", "engines"]
    for verdict in plan.verdicts:
        chosen = " (chosen)" if verdict.engine == settings.backend else ""
        lines.append(f"  {verdict.engine:<7} {'can run it' if verdict.accepted else 'cannot run it'}{chosen}")
        lines += [f"          - {miss}" for miss in verdict.missed]
        lines += [f"          note: {note}" for note in verdict.notes]
    if plan.notes:
        lines += ["", "notes", *(f"  - {note}" for note in plan.notes)]
    if plan.inspection:
        lines += ["", plan.inspection.text()]
    return "\n".join(lines)


def _model(plan: Plan) -> str:
    number = costs.num_parameters(plan.spec) if plan.spec else 0
    size = f", {number / 1e9:.3g} B parameters" if number >= 1e9 else f", {number / 1e6:.3g} M parameters"
    size = size if number else ""
    return f"{plan.job.model.path} ({plan.architecture}{size})"


def _engine(plan: Plan) -> str:
    asked = plan.job.backend
    if asked == "auto":
        why = "the first of cuda, triton, cpu that can run the model"
    elif asked == plan.settings.backend:
        why = "as the configuration says"
    else:
        why = f"instead of {asked}, which cannot run it (on_unsupported=fallback)"
    return f"{plan.settings.backend}: {why}"


def _host(plan: Plan) -> str:
    host = plan.host
    name = host.device_name or host.device
    count = f"{host.num_devices} x " if host.num_devices > 1 else ""
    sm = f", sm {host.compute_capability[0]}.{host.compute_capability[1]}" if host.compute_capability else ""
    cores = f", {host.cpu_cores} cores" if host.device == "cpu" and host.cpu_cores else ""
    memory = f", {gb(host.memory_bytes)}" if host.memory_bytes else ""
    return f"{'this machine' if not host.described else host.name}: {count}{name}{sm}{cores}{memory}"


def _memory(memory: Memory, typical: float) -> str:
    parts = [f"weights {gb(memory.weight_bytes)}"]
    if memory.activation_bytes:
        parts.append(f"activations up to {gb(memory.activation_bytes)}")
    if memory.kv_bytes_per_token and not memory.total_bytes:
        parts.append(f"KV cache {memory.kv_bytes_per_token:,} bytes a token")
    elif memory.kv_bytes_per_token:
        length = typical or TYPICAL_TOKENS
        what = "mean length here" if typical else "say"
        parts.append(
            f"KV cache {gb(memory.kv_bytes)} ({memory.kv_bytes_per_token:,} bytes a token: {memory.kv_tokens:,} "
            f"tokens, {memory.num_seqs(length):,} sequences of {length:,.0f}, {what})"
        )
    capacity = f"{gb(memory.total_bytes)} of {memory.device}" if memory.total_bytes else f"unknown of {memory.device}"
    verdict = {True: "fits", False: "DOES NOT FIT", None: "not known to fit"}[memory.fits]
    return f"{' + '.join(parts)}; {verdict} in {capacity}"
