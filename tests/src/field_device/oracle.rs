//! The rule itself: bytes and times in, events out. No file, no clock, no thread.

use lab_guest::line::{Line, Splitter, parse, printable};

use super::report::{At, DatedViolation, Event, Kind, Outage, Record, Verdict, Violation};

/// Bytes that a resync may skip; a line is far shorter.
const RESYNC_LIMIT: u64 = 4096;

/// How to judge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Silences longer than this are outages, ms.
    pub silence_ms: u64,
    /// The guest already runs: begin with whatever line comes first.
    pub resync: bool,
}

/// Watches one line, both ways.
#[derive(Debug)]
pub struct Oracle {
    settings: Settings,
    splitter: Splitter,
    verdict: Verdict,
    events: Vec<Record>,
    now: At,
    /// Bytes of the stream that have been judged.
    offset: u64,
    started: bool,
    skipped: u64,
    /// Whether the current silence was announced.
    silent: bool,
    /// An outage whose first line has not come yet, with the guest's clock before it.
    open_outage: Option<(Outage, Option<u64>)>,
    last_guest_ms: Option<u64>,
    last_mono_ns: Option<u64>,
    /// Counters of the guest as last reported: a violation is their growth.
    guest: GuestCounts,
    /// The `last=` of the newest R line.
    report: Option<u64>,
    /// The first number that the device may send, once known.
    send_from: Option<u64>,
    writing_stopped: bool,
}

#[derive(Debug, Default)]
struct GuestCounts {
    gaps: u64,
    repeats: u64,
    bad: u64,
    memory_bad: u64,
    clock_back: u64,
    base_known: bool,
}

impl Oracle {
    /// A judge who has seen nothing.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            splitter: Splitter::default(),
            verdict: Verdict::default(),
            events: Vec::new(),
            now: At::default(),
            offset: 0,
            started: false,
            skipped: 0,
            silent: false,
            open_outage: None,
            last_guest_ms: None,
            last_mono_ns: None,
            guest: GuestCounts::default(),
            report: None,
            send_from: None,
            writing_stopped: false,
        }
    }

    /// Bytes from the guest.
    pub fn receive(&mut self, now: At, bytes: &[u8]) -> Vec<Record> {
        self.now = now;
        if bytes.is_empty() {
            return Vec::new();
        }
        if let Some(before) = self.verdict.last_byte {
            let ms = now.mono_ms.saturating_sub(before.mono_ms);
            if ms > self.settings.silence_ms {
                self.event(Event::FirstByte { after_silence_ms: ms });
                let outage = Outage { from: before, ms, after_line: self.verdict.last_line, guest_ms: None };
                // An outage that brought bytes but no line yet is closed as it is.
                self.close_outage(None);
                self.open_outage = Some((outage, self.last_guest_ms));
            }
        } else {
            self.verdict.first_byte = Some(now);
        }
        self.silent = false;
        self.verdict.last_byte = Some(now);
        self.verdict.bytes += bytes.len() as u64;

        let mut splitter = std::mem::take(&mut self.splitter);
        splitter.feed(bytes, |piece| self.judge(piece));
        self.verdict.pending_bytes = splitter.pending().len() as u64;
        self.splitter = splitter;
        std::mem::take(&mut self.events)
    }

    /// Time passes.
    pub fn tick(&mut self, now: At) -> Vec<Record> {
        self.now = now;
        if let Some(before) = self.verdict.last_byte
            && !self.silent
        {
            let ms = now.mono_ms.saturating_sub(before.mono_ms);
            if ms > self.settings.silence_ms {
                self.silent = true;
                self.event(Event::Silence { after_line: self.verdict.last_line, ms });
            }
        }
        std::mem::take(&mut self.events)
    }

    /// Number of the first line that the device may send; `None` until the guest has said what it received so far.
    pub fn send_from(&self) -> Option<u64> {
        self.send_from
    }

    /// A device line was written whole.
    pub fn sent(&mut self, number: u64) {
        self.verdict.sent += 1;
        self.verdict.last_sent = number;
    }

    /// The device writes no more (`true`) or goes on.
    pub fn stop_writing(&mut self, stopped: bool) {
        self.writing_stopped = stopped;
    }

    /// Whether the guest has reported every line that was sent.
    pub fn all_reported(&self) -> bool {
        self.verdict.last_reported >= self.verdict.last_sent
    }

    /// The case is closed, and lines that were sent should have been reported: say so if they were not.
    pub fn close(&mut self, now: At) -> Vec<Record> {
        self.now = now;
        self.close_outage(None);
        if !self.all_reported() {
            let (sent, reported) = (self.verdict.last_sent, self.verdict.last_reported);
            self.violation(Kind::Undelivered, format!("line {sent} was sent, the guest has reported {reported}"), b"");
        }
        std::mem::take(&mut self.events)
    }

    /// The state of the case now.
    pub fn verdict(&self) -> Verdict {
        let mut verdict = self.verdict.clone();
        if let Some((outage, _)) = &self.open_outage {
            verdict.outages.push(outage.clone());
        }
        verdict.ok = self.started && verdict.violations == 0;
        verdict.undelivered = verdict.last_sent.saturating_sub(verdict.last_reported);
        verdict.drained = self.writing_stopped && verdict.undelivered == 0;
        verdict
    }

    fn event(&mut self, event: Event) {
        self.events.push(Record { at: self.now, event });
    }

    fn violation(&mut self, kind: Kind, what: String, line: &[u8]) {
        let (offset, after_line) = (self.offset, self.verdict.last_line);
        let violation = Violation { kind, what, offset, after_line, context: printable(line) };
        self.verdict.violations += 1;
        if self.verdict.first_violations.len() < Verdict::SHOWN {
            self.verdict.first_violations.push(DatedViolation { at: self.now, violation: violation.clone() });
        }
        self.event(Event::Violation(violation));
    }

    fn close_outage(&mut self, guest_ms: Option<u64>) {
        if let Some((mut outage, before)) = self.open_outage.take() {
            outage.guest_ms = guest_ms.zip(before).map(|(now, before)| now.saturating_sub(before));
            self.verdict.outages.push(outage.clone());
            self.event(Event::Outage(outage));
        }
    }

    /// One piece of the stream, without its newline.
    fn judge(&mut self, piece: &[u8]) {
        self.offset += piece.len() as u64 + 1;
        let line = match parse(piece) {
            Ok(line) => line,
            Err(why) => {
                self.skipped += piece.len() as u64 + 1;
                // The first piece of a running stream is the tail of a line.
                if self.started || !self.settings.resync || self.skipped > RESYNC_LIMIT {
                    self.violation(Kind::Corrupt, format!("bytes that are no line: {why}"), piece);
                }
                return;
            }
        };
        self.verdict.lines += 1;
        if self.in_order(&line, piece) {
            self.content(&line, piece);
        }
    }

    /// Exactly once and in order. Says whether the line is news.
    fn in_order(&mut self, line: &Line, piece: &[u8]) -> bool {
        if !self.started {
            self.started = true;
            self.event(Event::Started { line: line.number, skipped: self.skipped });
            if line.number != 1 && !self.settings.resync {
                self.violation(Kind::Start, format!("the stream begins at line {}, not at 1", line.number), piece);
            }
            self.verdict.last_line = line.number;
            return true;
        }
        let expected = self.verdict.last_line + 1;
        if line.number < expected {
            self.violation(Kind::Repeated, format!("line {} again, {expected} was next", line.number), piece);
            return false;
        }
        if line.number > expected {
            let what = format!("line {} instead of {expected}: {} lost", line.number, line.number - expected);
            self.violation(Kind::Lost, what, piece);
        }
        self.verdict.last_line = line.number;
        true
    }

    fn content(&mut self, line: &Line, piece: &[u8]) {
        match line.kind {
            'L' => {
                let mut words = line.fields.split(' ');
                let (boot, ms) = (words.next(), words.next().and_then(|w| w.parse().ok()));
                match (boot, ms, words.next()) {
                    (Some(boot), Some(ms), None) => {
                        self.boot_id(boot, piece);
                        self.guest_clock(ms, piece);
                        if self.open_outage.is_some() {
                            self.close_outage(Some(ms));
                        }
                    }
                    _ => self.violation(Kind::Corrupt, "an L line without boot id and time".into(), piece),
                }
            }
            'C' => self.clocks(line, piece),
            'R' => self.input_report(line, piece),
            'M' => self.memory(line, piece),
            'E' => {
                let kind = match line.fields.split(' ').next() {
                    Some("memory") => Kind::Memory,
                    Some("rx") => Kind::GuestInput,
                    _ => Kind::GuestError,
                };
                self.violation(kind, format!("the guest says: {}", line.fields), piece);
            }
            'P' => {
                self.verdict.power_off = true;
                self.event(Event::PowerOff);
            }
            other => self.violation(Kind::Corrupt, format!("a line of unknown kind {other}"), piece),
        }
    }

    fn boot_id(&mut self, id: &str, piece: &[u8]) {
        let id = id.get(..8).unwrap_or(id);
        if self.verdict.boot_ids.iter().any(|known| known == id) {
            return;
        }
        if !self.verdict.boot_ids.is_empty() {
            self.violation(Kind::BootId, format!("boot id {id}: the guest was booted anew"), piece);
        }
        self.verdict.boot_ids.push(id.to_string());
    }

    fn guest_clock(&mut self, ms: u64, piece: &[u8]) {
        match self.last_guest_ms {
            None => self.verdict.guest_clock_ms.0 = ms,
            Some(before) if ms < before => {
                self.violation(Kind::ClockBack, format!("the guest's clock went from {before} to {ms} ms"), piece);
            }
            Some(_) => {}
        }
        self.last_guest_ms = Some(ms);
        self.verdict.guest_clock_ms.1 = ms;
    }

    fn clocks(&mut self, line: &Line, piece: &[u8]) {
        let (Some(boot), Some(mono), Some(back)) = (line.field("boot"), line.count("mono_ns"), line.count("back"))
        else {
            return self.violation(Kind::Corrupt, "a C line without boot, mono_ns or back".into(), piece);
        };
        self.boot_id(boot, piece);
        self.verdict.boot_id = boot.to_string();
        if let Some(before) = self.last_mono_ns
            && mono < before
        {
            self.violation(Kind::ClockBack, format!("the guest's clock went from {before} to {mono} ns"), piece);
        }
        self.last_mono_ns = Some(mono);
        if back > self.guest.clock_back {
            self.violation(Kind::ClockBack, format!("the guest saw its clock go back {back} times"), piece);
            self.guest.clock_back = back;
        }
        self.verdict.rng_bytes = line.count("rng").unwrap_or_default();
        self.verdict.hvc_lines = line.count("hvc").unwrap_or_default();
    }

    fn input_report(&mut self, line: &Line, piece: &[u8]) {
        let (Some(last), Some(gaps), Some(repeats), Some(bad)) =
            (line.count("last"), line.count("gaps"), line.count("repeats"), line.count("bad"))
        else {
            return self.violation(Kind::Corrupt, "an R line without last, gaps, repeats or bad".into(), piece);
        };
        if !self.guest.base_known && self.settings.resync {
            // What happened before this device began is not its business.
            self.guest = GuestCounts { gaps, repeats, bad, ..std::mem::take(&mut self.guest) };
        }
        self.guest.base_known = true;
        for (name, now, before) in [
            ("missed", gaps, self.guest.gaps),
            ("got twice", repeats, self.guest.repeats),
            ("could not read", bad, self.guest.bad),
        ] {
            if now != before {
                let what = format!("device lines that the guest {name}: {now}, were {before}");
                self.violation(Kind::GuestInput, what, piece);
            }
        }
        self.guest = GuestCounts { gaps, repeats, bad, ..std::mem::take(&mut self.guest) };
        (self.verdict.guest_gaps, self.verdict.guest_repeats, self.verdict.guest_bad) = (gaps, repeats, bad);

        match self.send_from {
            // With a running stream a predecessor's lines may still be under way: wait until the number stands still.
            None if !self.settings.resync || self.report == Some(last) => {
                self.send_from = Some(last + 1);
                self.verdict.last_sent = last;
                self.verdict.last_reported = last;
                self.event(Event::Sending { from: last + 1 });
            }
            None => {}
            Some(_) => {
                let (sent, reported) = (self.verdict.last_sent, self.verdict.last_reported);
                if last > sent {
                    let what = format!("the guest reports line {last}, only {sent} were sent");
                    self.violation(Kind::Reported, what, piece);
                } else if last < reported {
                    let what = format!("the guest reports line {last} after it had reported {reported}");
                    self.violation(Kind::Reported, what, piece);
                }
                self.verdict.last_reported = last;
            }
        }
        self.report = Some(last);
    }

    fn memory(&mut self, line: &Line, piece: &[u8]) {
        let (Some(round), Some(written), Some(bad)) = (line.count("round"), line.count("written"), line.count("bad"))
        else {
            return self.violation(Kind::Corrupt, "an M line without round, written or bad".into(), piece);
        };
        if bad > self.guest.memory_bad {
            self.violation(Kind::Memory, format!("the guest found {bad} bad pages"), piece);
            self.guest.memory_bad = bad;
        }
        if written < self.verdict.memory_pages {
            let before = self.verdict.memory_pages;
            self.violation(Kind::Memory, format!("the sweep went back from {before} to {written} pages"), piece);
        }
        self.verdict.memory_bad = bad;
        self.verdict.memory_pages = written;
        self.verdict.memory_rounds = round;
    }
}

#[cfg(test)]
mod tests;
