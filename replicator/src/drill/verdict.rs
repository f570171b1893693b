//! What was seen of a machine that ran from a copy of the image, and what follows from it.
//!
//! A guest *lives* if it still runs at the end, did not reset or switch itself off, and visibly did something: a vCPU moved, or RAM was
//! written. An idle guest does both, with each tick of its timer.

use serde::{Deserialize, Serialize};
use understudy_protocol::control::{CopiedImage, VcpuPosition, VmmState, VmmStatus};

/// One look at the machine.
#[derive(Debug, Clone)]
pub struct Look {
    /// The VMM.
    pub status: VmmStatus,
    /// Its vCPUs.
    pub positions: Vec<VcpuPosition>,
    /// Pages written since the look before.
    pub dirty: u64,
}

/// The result of a drill, as `--json` prints it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The machine.
    pub machine: String,
    /// Whether its guest lives in the copy.
    pub alive: bool,
    /// The copy: which epoch, how it was made.
    pub copied: CopiedImage,
    /// From the start of the stand-in's promotion to its running, ms.
    pub promote_ms: u64,
    /// How long the guest ran, ns of its own time.
    pub ran_ns: u64,
    /// vCPUs that moved, of `vcpus`; one that waited for an interrupt each time does not count as one that moved.
    pub moved: usize,
    /// vCPUs.
    pub vcpus: usize,
    /// Page writes seen: a page counts once for each look.
    pub pages_written: u64,
    /// Output that would have left: port and bytes.
    pub outputs: Vec<(String, u64)>,
    /// The verdict and its reasons, as sentences.
    pub findings: Vec<String>,
}

/// How the watching ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// As planned.
    Watched,
    /// The machine could not be started, or its VMM ended by itself: what it said last.
    Died(String),
}

/// Judge. `looks` are in order.
pub fn judge(machine: &str, copied: CopiedImage, promote_ms: u64, looks: &[Look], end: End) -> Report {
    let mut findings = Vec::new();
    let (first, last) = (looks.first(), looks.last());
    let vcpus = first.map_or(0, |look| look.positions.len());
    let ran_ns = match (first, last) {
        (Some(first), Some(last)) => last.status.vm_time_ns.saturating_sub(first.status.vm_time_ns),
        _ => 0,
    };
    let moves = |id: usize| {
        looks
            .windows(2)
            .any(|pair| pair[0].positions.get(id).map(|p| p.rip) != pair[1].positions.get(id).map(|p| p.rip))
    };
    let moved = (0..vcpus).filter(|id| moves(*id)).count();
    let pages_written: u64 = looks.iter().map(|look| look.dirty).sum();
    let mut outputs = Vec::new();
    if let (Some(first), Some(last)) = (first, last) {
        for (before, after) in first.status.serial.iter().zip(&last.status.serial) {
            outputs.push((after.port.clone(), after.tx_bytes.saturating_sub(before.tx_bytes)));
        }
        if last.status.resets > first.status.resets {
            findings.push("its guest reset the machine: it has crashed, or its watchdog has".to_owned());
        }
        match last.status.state {
            VmmState::Running => {}
            VmmState::ShutDown => findings.push("its guest switched the machine off".to_owned()),
            other => findings.push(format!("the machine is {other:?} instead of running")),
        }
    }
    match end {
        End::Died(why) => findings.push(why),
        End::Watched if looks.len() < 2 => findings.push("it was not watched long enough to see anything".into()),
        End::Watched if ran_ns == 0 => findings.push("its time stands still".into()),
        End::Watched if moved == 0 && pages_written == 0 => {
            findings.push("no vCPU moved and nothing was written: the guest hangs".into());
        }
        End::Watched => {}
    }
    let alive = findings.is_empty();
    let epoch = copied.epoch;
    findings.insert(
        0,
        match alive {
            true => format!(
                "alive: the guest runs on from epoch {epoch}; {moved} of {vcpus} vCPUs moved, {pages_written} page writes were seen"
            ),
            false => format!("NOT ALIVE: the machine did not live on from epoch {epoch}"),
        },
    );
    Report {
        machine: machine.to_owned(),
        alive,
        copied,
        promote_ms,
        ran_ns,
        moved,
        vcpus,
        pages_written,
        outputs,
        findings,
    }
}

impl Report {
    /// For people; lines with newlines.
    pub fn text(&self) -> String {
        let mut lines = vec![format!("drill of {}: {}", self.machine, self.findings.join("; "))];
        let copied = &self.copied;
        lines.push(format!(
            "  copied     {} pages in {} rounds and {} ms; arriving epochs waited {:.1} ms for the last",
            copied.pages,
            copied.rounds,
            copied.took_ms,
            copied.held_us as f64 / 1e3
        ));
        lines.push(format!(
            "  ran        {:.1} s, {} ms after it was promoted",
            self.ran_ns as f64 / 1e9,
            self.promote_ms
        ));
        let outputs: Vec<String> = self.outputs.iter().map(|(port, bytes)| format!("{port} {bytes} bytes")).collect();
        lines.push(format!(
            "  would have sent: {}",
            if outputs.is_empty() { "nothing".into() } else { outputs.join(", ") }
        ));
        lines.join("\n") + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use understudy_protocol::ids::{Epoch, Generation};

    fn copied() -> CopiedImage {
        CopiedImage { epoch: Epoch(7), generation: Generation(1), pages: 1, rounds: 2, took_ms: 3, held_us: 4 }
    }

    fn look(ms: u64, rip: u64, dirty: u64) -> Look {
        let mut status = crate::report::testing::sender().vmm.unwrap();
        status.vm_time_ns = ms * 1_000_000;
        status.serial[0].tx_bytes = 7 + ms;
        Look { status, positions: vec![VcpuPosition { rip, halted: false }; 2], dirty }
    }

    fn verdict(looks: &[Look], end: End) -> Report {
        judge("m", copied(), 5, looks, end)
    }

    #[test]
    fn a_guest_that_moves_or_writes_lives_and_its_outputs_are_counted() {
        let report = verdict(&[look(0, 1, 0), look(500, 2, 3), look(900, 2, 4)], End::Watched);
        assert!(report.alive, "{report:?}");
        assert_eq!((report.moved, report.vcpus, report.pages_written), (2, 2, 7));
        assert_eq!(report.outputs, [("com1".to_owned(), 900)]);
        assert_eq!(report.ran_ns, 900_000_000);
        let text = report.text();
        assert!(text.contains("alive") && text.contains("com1 900 bytes") && text.contains("epoch 7"), "{text}");
        assert!(verdict(&[look(0, 1, 0), look(500, 1, 1)], End::Watched).alive, "it writes");
        assert!(verdict(&[look(0, 1, 0), look(500, 2, 0)], End::Watched).alive, "it moves");
    }

    #[test]
    fn a_guest_that_hangs_resets_ends_or_cannot_be_watched_does_not_live() {
        let says = |report: Report, what: &str| {
            assert!(!report.alive && report.findings[0].starts_with("NOT ALIVE"), "{report:?}");
            assert!(report.findings.iter().any(|finding| finding.contains(what)), "{what}: {report:?}");
        };
        says(verdict(&[look(0, 1, 0), look(500, 1, 0)], End::Watched), "hangs");
        says(verdict(&[look(0, 1, 0), look(0, 2, 0)], End::Watched), "stands still");
        says(verdict(&[look(0, 1, 0)], End::Watched), "long enough");
        says(verdict(&[], End::Died("its state is damaged".into())), "its state is damaged");
        let mut reset = look(500, 2, 2);
        reset.status.resets += 1;
        says(verdict(&[look(0, 1, 0), reset], End::Watched), "reset");
        let mut off = look(500, 2, 2);
        off.status.state = VmmState::ShutDown;
        says(verdict(&[look(0, 1, 0), off], End::Watched), "switched the machine off");
    }
}
