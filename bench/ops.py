"""The ops that are measured: module by name; each offers ``cases(quick)``."""

from bench import bench_ema_update, bench_enqueue, bench_info_nce

OPS = {"info_nce": bench_info_nce, "ema_update_": bench_ema_update, "enqueue_": bench_enqueue}
