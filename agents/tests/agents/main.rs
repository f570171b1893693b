//! The agents as whole processes, on a node made of a temporary directory.
//!
//! This executable is also everything that the agents start and ask: linked as `understudy-vmm`, `understudy-replicator`,
//! `understudy-serial`, `crm_attribute`, `cibadmin` or `crm_node` it behaves as one (see `fakes`). Real processes, sockets and
//! signals; no cluster, no KVM, no root.

mod evacuator;
mod fakes;
mod metadata;
mod migration;
mod monitor;
mod node;
mod replicator;
mod serial;
mod sharing;
mod vmm;

use libtest_mimic::{Arguments, Failed, Trial};

fn main() {
    let name = std::env::args().next().unwrap_or_default();
    let name = std::path::Path::new(&name).file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    if let Some(fake) = fakes::by_name(&name) {
        std::process::exit(fake());
    }
    let mut trials = Vec::new();
    for (module, tests) in [
        ("metadata", metadata::TESTS),
        ("vmm", vmm::TESTS),
        ("replicator", replicator::TESTS),
        ("serial", serial::TESTS),
        ("migration", migration::TESTS),
        ("sharing", sharing::TESTS),
        ("evacuator", evacuator::TESTS),
        ("monitor", monitor::TESTS),
    ] {
        for (title, test) in tests {
            trials.push(Trial::test(format!("{module}: {title}"), || {
                test();
                Ok::<(), Failed>(())
            }));
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}

/// A sentence and the function that proves it.
type Test = (&'static str, fn());
