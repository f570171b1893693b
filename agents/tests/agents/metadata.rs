//! The metadata of every agent is what was reviewed. `UPDATE_METADATA=1` writes it anew.

use std::fs;
use std::path::Path;

use understudy_agents::{AGENTS, agent};

use crate::Test;

pub const TESTS: &[Test] = &[
    ("the metadata of every agent is what was reviewed", golden),
    ("every default is a valid value", defaults),
    ("every parameter and agent has its texts, every action a timeout with a unit", texts),
];

fn golden() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/metadata");
    for name in AGENTS {
        let text =
            ocf::metadata::document(&agent(name).unwrap().description()).replace(env!("CARGO_PKG_VERSION"), "VERSION");
        let file = dir.join(format!("{name}.xml"));
        if std::env::var_os("UPDATE_METADATA").is_some() {
            fs::write(&file, &text).unwrap();
        }
        assert_eq!(fs::read_to_string(&file).unwrap(), text, "{name}: if this is meant, UPDATE_METADATA=1");
    }
}

fn defaults() {
    for name in AGENTS {
        let mut parameters = agent(name).unwrap().description().parameters;
        parameters.retain(|p| !p.required);
        ocf::parameter::Parameters::new(ocf::Environment::default()).validate(&parameters).unwrap();
    }
}

fn texts() {
    for name in AGENTS {
        let d = agent(name).unwrap().description();
        assert!(!d.short.is_empty() && d.long.len() > 80, "{name}");
        for p in d.parameters {
            assert!(!p.short.is_empty() && p.long.ends_with('.'), "{name} {}", p.name);
            assert!(!(p.required && p.default.is_some()), "{name} {}", p.name);
        }
        for a in d.actions {
            for time in [Some(a.timeout), a.interval].into_iter().flatten() {
                assert!(
                    time.ends_with('s') && ocf::parameter::parse_time(time).is_some(),
                    "{name} {} {time}",
                    a.action
                );
            }
        }
    }
}
