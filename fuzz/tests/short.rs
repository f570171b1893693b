//! The corpus, and what a moment of random changes makes of it: seconds in every run of the tests. The long way is `make fuzz`.
//!
//! `UNDERSTUDY_FUZZ_SECONDS=N` gives every target N seconds, `UNDERSTUDY_FUZZ_SEED=N` other random changes; `UNDERSTUDY_FUZZ_TARGETS=a,b`
//! changes the inputs of these targets only.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use understudy_fuzz::mutate::{Random, mutated};
use understudy_fuzz::{TARGETS, Target, corpus, seeds};

/// An input that takes longer hangs something.
const HANGS: Duration = Duration::from_secs(5);

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn inputs(target: &Target) -> Vec<(PathBuf, Vec<u8>)> {
    let dir = corpus(target);
    let files = fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut inputs: Vec<_> =
        files.map(|file| file.unwrap().path()).map(|path| (path.clone(), fs::read(path).unwrap())).collect();
    inputs.sort();
    inputs
}

/// Feed it; an input that breaks something is written to a file, so that it can be looked at and put into the corpus.
fn feed(target: &Target, bytes: &[u8], name: &str) {
    let began = Instant::now();
    let survived = catch_unwind(AssertUnwindSafe(|| (target.run)(bytes))).is_ok();
    let took = began.elapsed();
    if survived && took < HANGS {
        return;
    }
    let kept = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{}", target.name, bytes.len()));
    fs::write(&kept, bytes).unwrap();
    let what = if survived { format!("hangs for {took:?}") } else { "panics".into() };
    panic!("{} {what} on {name}; the input is {}", target.name, kept.display());
}

#[test]
fn no_input_of_the_corpus_breaks_anything() {
    for target in TARGETS {
        let inputs = inputs(target);
        assert!(!inputs.is_empty(), "{} has no inputs", target.name);
        for (path, bytes) in inputs {
            feed(target, &bytes, &path.display().to_string());
        }
    }
}

#[test]
fn nothing_that_a_moment_of_random_changes_makes_breaks_anything() {
    let each = setting("UNDERSTUDY_FUZZ_SECONDS").map_or(Duration::from_millis(150), Duration::from_secs);
    let seed = setting("UNDERSTUDY_FUZZ_SEED").unwrap_or(1);
    let only = std::env::var("UNDERSTUDY_FUZZ_TARGETS").ok();
    let meant = |t: &&Target| only.as_ref().is_none_or(|names| names.split(',').any(|name| name == t.name));
    for target in TARGETS.iter().filter(meant) {
        let inputs: Vec<_> = inputs(target).into_iter().map(|(_, bytes)| bytes).collect();
        let mut random = Random::new(seed);
        let (began, mut tried) = (Instant::now(), 0u64);
        while began.elapsed() < each || tried < 10 {
            feed(target, &mutated(&inputs, &mut random), &format!("input {tried} of seed {seed}"));
            tried += 1;
        }
        println!("{}: {tried} inputs", target.name);
    }
}

#[test]
fn seeds_are_in_the_corpus() {
    let write = std::env::var_os("UNDERSTUDY_FUZZ_SEEDS").is_some();
    for (name, file, bytes) in seeds::seeds() {
        let target = understudy_fuzz::target(name).unwrap_or_else(|| panic!("there is no target {name}"));
        let path = corpus(target).join(file);
        if write {
            fs::create_dir_all(corpus(target)).unwrap();
            fs::write(&path, &bytes).unwrap();
        }
        assert!(path.exists(), "{} is missing: run once with UNDERSTUDY_FUZZ_SEEDS=1", path.display());
        assert!(bytes.len() <= 16 * 1024, "{name}/{file} is too large for a repository");
    }
}

#[test]
fn the_run_notices_what_panics_and_what_hangs() {
    let bad = Target { name: "bad", about: "", run: |bytes| assert!(bytes.len() < 3) };
    feed(&bad, b"ab", "short");
    assert!(catch_unwind(|| feed(&bad, b"abc", "long")).is_err());
}
