"""What is measured: module by name; each offers ``cases(quick, device)``."""

from bench import bench_ema_update, bench_enqueue, bench_fused_step, bench_info_nce

OPS = {
    "info_nce": bench_info_nce,
    "ema_update_": bench_ema_update,
    "fused step": bench_fused_step,
    "enqueue_": bench_enqueue,
}
