//! Random estates, small enough that all their placements can be tried.

use std::fmt::Write;

use fastrand::Rng;
use understudy_crm::policy::Policy;

/// A policy with the controller.
pub fn random(rng: &mut Rng) -> Policy {
    let racks = rng.usize(1..4);
    let nodes = rng.usize(3..8);
    let limited = rng.bool();
    let mut text = String::new();
    let automation = *rng.choice(&["manual", "semi", "automatic", "automatic"]).unwrap_or(&"manual");
    let _ = writeln!(text, "[cluster]\nautomation = \"{automation}\"\n[evacuation]");
    let _ = writeln!(text, "batch = {}\nverify = {}\nsettle = {}", rng.u8(1..4), rng.u8(10..60), rng.u8(0..5));
    let _ = writeln!(text, "max_down = {}\nfailures = {}", *rng.choice(&[40, 60, 100]).unwrap_or(&40), rng.u8(1..3));
    if rng.u8(0..4) == 0 {
        let _ = writeln!(text, "max_rack_down = 1");
    }
    let _ = writeln!(text, "[approval]\nunanswered = \"{}\"", if rng.bool() { "refuse" } else { "approve" });
    for n in 0..nodes {
        let _ = writeln!(text, "[[nodes]]\nname = \"n{n}\"\nstorage = \"s{n}\"\nrack = \"r{}\"", n % racks);
        // The last one or two are the dedicated cluster.
        let dedicated = n > 1 && n + rng.usize(1..3) > nodes;
        let _ = writeln!(text, "{}", if dedicated { "high_performance = \"h\"" } else { "cluster = \"c\"" });
        if limited {
            let _ = writeln!(text, "memory = {}", rng.u16(600..2000));
        }
    }
    for m in 0..rng.usize(2..9) {
        let memory = rng.u16(100..700);
        let _ = writeln!(text, "[[machines]]\nname = \"m{m}\"\nkernel = \"/k\"\nmemory = {memory}\ncluster = \"c\"");
        let mode = if rng.u8(0..8) == 0 { "none" } else { "restart" };
        let _ = writeln!(text, "mode = \"{mode}\"\nmigrate = {}", rng.u8(0..3) > 0);
        if rng.bool() {
            let _ = writeln!(text, "business = \"b{}\"", rng.u8(0..2));
        }
        if rng.bool() {
            let evacuation = ["own", "own-then-dedicated", "dedicated", "dedicated-then-own"];
            let evacuation = *rng.choice(&evacuation).unwrap_or(&"own");
            let _ = writeln!(text, "performance = \"high\"\nevacuation = \"{evacuation}\"");
        }
        if rng.u8(0..4) == 0 {
            let _ = writeln!(text, "priority = {}", rng.u8(1..4));
        }
        if rng.u8(0..5) == 0 {
            let own = *rng.choice(&["manual", "semi", "automatic"]).unwrap_or(&"manual");
            let _ = writeln!(text, "automation = \"{own}\"");
        }
    }
    Policy::parse(&text).unwrap_or_else(|e| panic!("{e:?}\n{text}"))
}
