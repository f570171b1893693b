//! The targets under libFuzzer: `UNDERSTUDY_FUZZ_TARGET=frame understudy-fuzz-coverage CORPUS… [-max_total_time=60 …]`.
//! `make fuzz` builds it with the instrumentation that libFuzzer reads.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use understudy_fuzz::{TARGETS, Target, target};

static TARGET: OnceLock<&'static Target> = OnceLock::new();

fuzz_target!(|bytes: &[u8]| {
    let target = TARGET.get_or_init(|| {
        let name = std::env::var("UNDERSTUDY_FUZZ_TARGET").unwrap_or_default();
        target(&name).unwrap_or_else(|| {
            eprintln!("set UNDERSTUDY_FUZZ_TARGET to one of {TARGETS:?}");
            std::process::exit(2);
        })
    });
    (target.run)(bytes);
});
