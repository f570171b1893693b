//! The live view: one screen, drawn again and again, of what a machine's replication did in the last seconds.
//!
//! [`draw`] is a pure function from two samples and the size of the screen to lines of text. [`watch`] takes samples and
//! shows them: full screen on a terminal until `q`, Escape or Ctrl-C; one line a sample elsewhere.

use std::collections::VecDeque;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant, SystemTime};

use crossterm::event::{Event, KeyCode, KeyEventKind, KeyModifiers, poll, read};
use crossterm::{cursor, execute, queue, style, terminal};
use understudy_protocol::control::{NicStatus, PathStatus, ReplicatorStatus, Role, VmmStatus};
use understudy_protocol::layout::Layout;
use understudy_protocol::statistics::{Bucket, Histogram};

use super::Sample;
use super::text::{capture_line, path_alarm, path_state, role, size, time, verify};
use crate::log;

/// The histograms show so much of the past.
const WINDOW: Duration = Duration::from_secs(10);

/// Take samples every `interval` and show them on standard output until the person, or the pipe, has had enough; `count`
/// samples at the most if it is given.
pub fn watch(layout: &Layout, interval: Duration, count: Option<u64>) -> io::Result<()> {
    let done = if io::stdout().is_terminal() && io::stdin().is_terminal() {
        full_screen(layout, interval, count)
    } else {
        lines(layout, interval, count)
    };
    match done {
        // Whoever read our output has seen enough.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// Puts the terminal back as it was, whatever happens.
struct Screen;

impl Screen {
    fn take() -> io::Result<Self> {
        terminal::enable_raw_mode()?;
        let screen = Self;
        execute!(io::stdout(), terminal::EnterAlternateScreen, cursor::Hide)?;
        Ok(screen)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // There is nobody left to tell if this fails.
        let _ = execute!(io::stdout(), cursor::Show, terminal::LeaveAlternateScreen);
        let _ = terminal::disable_raw_mode();
    }
}

fn full_screen(layout: &Layout, interval: Duration, count: Option<u64>) -> io::Result<()> {
    let _screen = Screen::take()?;
    let mut past = Past::default();
    let mut taken = 0;
    loop {
        past.add(Sample::take(layout));
        taken += 1;
        show(&past)?;
        if count.is_some_and(|count| taken >= count) {
            return Ok(());
        }
        let next = Instant::now() + interval;
        while poll(next.saturating_duration_since(Instant::now()))? {
            match read()? {
                Event::Key(key) if key.kind != KeyEventKind::Release => match key.code {
                    KeyCode::Char('q' | 'Q') | KeyCode::Esc => return Ok(()),
                    KeyCode::Char('c' | 'd') if key.modifiers.contains(KeyModifiers::CONTROL) => return Ok(()),
                    _ => {}
                },
                Event::Resize(..) => show(&past)?,
                _ => {}
            }
        }
    }
}

fn show(past: &Past) -> io::Result<()> {
    let (Some(now), Some(before)) = (past.samples.back(), past.samples.front()) else { return Ok(()) };
    let (width, height) = terminal::size()?;
    let mut out = io::stdout().lock();
    queue!(out, cursor::MoveTo(0, 0))?;
    for (row, line) in (0..height).zip(draw(before, now, width.into(), height.into())) {
        queue!(out, cursor::MoveTo(0, row), style::Print(line), terminal::Clear(terminal::ClearType::UntilNewLine))?;
    }
    queue!(out, terminal::Clear(terminal::ClearType::FromCursorDown))?;
    out.flush()
}

fn lines(layout: &Layout, interval: Duration, count: Option<u64>) -> io::Result<()> {
    let mut past = Past::default();
    let mut taken = 0;
    loop {
        past.add(Sample::take(layout));
        taken += 1;
        let mut last_two = past.samples.iter().rev();
        if let Some(now) = last_two.next() {
            let line = line(last_two.next().unwrap_or(now), now);
            writeln!(io::stdout(), "{} {line}", log::timestamp(SystemTime::now()))?;
        }
        if count.is_some_and(|count| taken >= count) {
            return Ok(());
        }
        std::thread::sleep(interval);
    }
}

/// The samples of the last [`WINDOW`], and one before.
#[derive(Default)]
struct Past {
    samples: VecDeque<Sample>,
}

impl Past {
    fn add(&mut self, sample: Sample) {
        while self.samples.get(1).is_some_and(|second| sample.at.duration_since(second.at) >= WINDOW) {
            self.samples.pop_front();
        }
        self.samples.push_back(sample);
    }
}

/// What happened between two samples of one process.
struct Between<'a> {
    before: Option<&'a ReplicatorStatus>,
    now: &'a ReplicatorStatus,
    seconds: f64,
}

impl<'a> Between<'a> {
    fn new(before: &'a Sample, now: &'a Sample) -> Option<Self> {
        let status = now.replicator.as_ref().ok()?;
        // Counters that went down are another process's.
        let same = |b: &&ReplicatorStatus| {
            b.role == status.role && b.wire_bytes <= status.wire_bytes && b.epochs <= status.epochs
        };
        let seconds = now.at.duration_since(before.at).as_secs_f64();
        Some(Self { before: before.replicator.as_ref().ok().filter(same), now: status, seconds })
    }

    fn rate(&self, counter: impl Fn(&ReplicatorStatus) -> u64) -> Option<f64> {
        let before = self.before.filter(|_| self.seconds > 0.0)?;
        Some(counter(self.now).saturating_sub(counter(before)) as f64 / self.seconds)
    }

    fn bytes(&self, counter: impl Fn(&ReplicatorStatus) -> u64) -> String {
        self.rate(counter).map_or_else(|| "–".into(), |rate| format!("{}/s", size(rate as u64)))
    }

    fn histogram(&self, of: impl Fn(&ReplicatorStatus) -> &Histogram) -> Histogram {
        self.before.map_or_else(|| of(self.now).clone(), |before| difference(of(self.now), of(before)))
    }
}

/// What was recorded since `before`. Its largest value is only known to the range.
fn difference(now: &Histogram, before: &Histogram) -> Histogram {
    let had = |up_to| before.buckets.iter().find(|b| b.up_to == up_to).map_or(0, |b| b.count);
    let newer = now.buckets.iter().map(|b| Bucket { count: b.count.saturating_sub(had(b.up_to)), ..*b });
    let buckets: Vec<Bucket> = newer.filter(|b| b.count > 0).collect();
    Histogram {
        count: now.count.saturating_sub(before.count),
        sum: now.sum.saturating_sub(before.sum),
        max: buckets.last().map_or(0, |b| b.up_to.unwrap_or(now.max).min(now.max)),
        buckets,
    }
}

/// One sample in one line.
fn line(before: &Sample, now: &Sample) -> String {
    let Some(between) = Between::new(before, now) else {
        return now.replicator.as_ref().err().cloned().unwrap_or_default();
    };
    let status = between.now;
    let pause = between.histogram(|s| &s.statistics.pause_us);
    let commit = between.histogram(|s| &s.statistics.commit_us);
    let mut line = format!("{} {} {:?}", status.machine, role(status.role), status.replica);
    if status.role == Role::Sender {
        line += if status.protected { " protected" } else { " NOT-PROTECTED" };
        let capture = now.vmm.as_ref().ok().map(|vmm| &vmm.capture);
        if let Some(capture) = capture.filter(|capture| !capture.strategy.is_empty()) {
            line += &format!(" capture={}", capture.strategy);
        }
    }
    line += &format!(" epoch={} lag={}ms", status.committed, status.lag_ms);
    if let Some(rate) = between.rate(|s| s.epochs) {
        line += &format!(" epochs/s={rate:.1}");
    }
    if !status.paths.is_empty() {
        let work = status.paths.iter().filter(|path| path.works).count();
        line += &format!(" paths={work}/{}", status.paths.len());
    }
    if pause.count > 0 {
        line +=
            &format!(" pause-p50={} pause-p99={}", tight(time(pause.quantile(0.5))), tight(time(pause.quantile(0.99))));
    }
    if commit.count > 0 {
        line += &format!(
            " commit-p50={} commit-p99={}",
            tight(time(commit.quantile(0.5))),
            tight(time(commit.quantile(0.99)))
        );
    }
    line += &format!(" wire={}", tight(between.bytes(|s| s.wire_bytes)));
    line
}

fn tight(number: String) -> String {
    number.replace(' ', "")
}

/// The screen: at most `height` lines of at most `width` characters.
pub fn draw(before: &Sample, now: &Sample, width: usize, height: usize) -> Vec<String> {
    let mut lines = match Between::new(before, now) {
        Some(between) => {
            let mut lines = head(&between, before, now);
            let bars = histograms(&between);
            let room = height.saturating_sub(lines.len() + 2);
            lines.extend(beside(&bars, width, room));
            lines
        }
        None => {
            let why = now.replicator.as_ref().err().map_or("", String::as_str);
            vec!["The replicator does not answer.".into(), why.into(), vmm_line(now.vmm.as_ref())]
        }
    };
    lines.truncate(height.saturating_sub(1));
    lines.resize(height.saturating_sub(1), String::new());
    lines.push("q: quit".into());
    lines.into_iter().map(|line| line.chars().take(width).collect()).collect()
}

fn head(between: &Between<'_>, before: &Sample, now: &Sample) -> Vec<String> {
    let (status, statistics) = (between.now, &between.now.statistics);
    let mut state = format!("{:?}, {:?}", status.replica, status.source);
    if status.role == Role::Sender {
        state += if status.protected { ", protected" } else { ", NOT PROTECTED" };
        state += if status.vetoed { ", veto" } else { "" };
    }
    let peer = status.peer.as_deref().unwrap_or("none");
    let connected = if status.connected { "connected" } else { "not connected" };
    let rate = between.rate(|s| s.epochs).map_or_else(String::new, |rate| format!("   {rate:.1}/s"));
    let mut lines = vec![
        format!("understudy  {}  {}  generation {}", status.machine, role(status.role), status.generation),
        format!("state    {state}"),
        format!("peer     {peer}, {connected}   losses {}", status.losses),
    ];
    for (at, path) in status.paths.iter().enumerate() {
        let of = |count: fn(&PathStatus) -> u64| {
            between.bytes(move |s| s.paths.get(at).filter(|p| p.address == path.address).map_or(0, count))
        };
        lines.push(format!(
            "path     {} {}   round trip {}   out {}   in {}   losses {}",
            path.address,
            path_state(path),
            time(path.rtt_us),
            of(|p| p.sent_bytes),
            of(|p| p.received_bytes),
            path.losses
        ));
    }
    lines.extend(path_alarm(&status.paths).map(|alarm| format!("ALARM    {alarm}")));
    lines.extend([
        format!(
            "epochs   committed {}   current {}   in flight {}   lag {}{rate}",
            status.committed,
            status.current,
            statistics.in_flight,
            time(status.lag_ms * 1000)
        ),
        vmm_line(now.vmm.as_ref()),
    ]);
    lines.extend(cards(before, now, between.seconds));
    let mut stages = Vec::new();
    if status.role == Role::Sender {
        stages.push(format!("captured {}", between.bytes(|s| s.statistics.bytes.captured)));
    }
    stages.push(format!("raw {}", between.bytes(|s| s.raw_bytes)));
    if status.role == Role::Sender {
        stages.push(format!("changed {}", between.bytes(|s| s.statistics.bytes.changed)));
        stages.push(format!("encoded {}", between.bytes(|s| s.statistics.bytes.encoded)));
    }
    stages.push(format!("wire {}", between.bytes(|s| s.wire_bytes)));
    stages.push(format!("committed {}", between.bytes(|s| s.statistics.bytes.committed)));
    lines.push(format!("bytes    {}", stages.join("   ")));
    if status.sync_progress < 1.0 {
        let filled = (status.sync_progress * 40.0) as usize;
        lines.push(format!("copy     [{:40}] {:.0} %", "#".repeat(filled.min(40)), status.sync_progress * 100.0));
    }
    lines.push(format!("verify   {}", verify(&status.verify, status.role)));
    lines.push(format!("note     {}", status.note));
    lines.push(String::new());
    lines
}

fn vmm_line(vmm: Result<&VmmStatus, &String>) -> String {
    match vmm {
        Ok(status) if status.capture.strategy.is_empty() => format!("machine  {}", machine(status)),
        Ok(status) => format!("machine  {}   capture {}", machine(status), capture_line(&status.capture)),
        Err(why) => format!("machine  {why}"),
    }
}

/// The machine's network cards: what went each way, and how long packets waited for their checkpoint.
fn cards(before: &Sample, now: &Sample, seconds: f64) -> Vec<String> {
    let nics = |sample: &'_ Sample| sample.vmm.as_ref().map_or_else(|_| Vec::new(), |vmm| vmm.nics.clone());
    let earlier = nics(before);
    let one = |nic: &NicStatus| {
        // As in [`Between::new`].
        let same =
            |e: &&NicStatus| e.name == nic.name && e.out_bytes <= nic.out_bytes && e.held_us.count <= nic.held_us.count;
        let earlier = earlier.iter().find(same);
        let rate = |count: fn(&NicStatus) -> u64| match earlier {
            Some(e) if seconds > 0.0 => {
                format!("{}/s", size((count(nic).saturating_sub(count(e)) as f64 / seconds) as u64))
            }
            _ => "–".into(),
        };
        let held = earlier.map_or_else(|| nic.held_us.clone(), |e| difference(&nic.held_us, &e.held_us));
        let waited = match held.count {
            0 => String::new(),
            _ => format!("   waited p50 ≤ {}  p99 ≤ {}", time(held.quantile(0.5)), time(held.quantile(0.99))),
        };
        let (out, into) = (rate(|n| n.out_bytes), rate(|n| n.in_bytes));
        let (name, link, held) = (&nic.name, &nic.link, size(nic.held_bytes));
        format!("card     {name} {link}   out {out}   in {into}   held {held}{waited}")
    };
    nics(now).iter().map(one).collect()
}

fn machine(status: &VmmStatus) -> String {
    format!("{:?}, gate {:?}, has run {} s", status.state, status.gate, status.vm_time_ns / 1_000_000_000)
}

fn histograms(between: &Between<'_>) -> Vec<Vec<String>> {
    let commit = between.histogram(|s| &s.statistics.commit_us);
    if between.now.role == Role::Receiver {
        let sizes = between.histogram(|s| &s.statistics.epoch_bytes);
        return vec![bars("arrival to applied", &commit, time), bars("bytes an epoch", &sizes, size)];
    }
    let pause = between.histogram(|s| &s.statistics.pause_us);
    let epoch = between.histogram(|s| &s.statistics.epoch_us);
    vec![bars("pause", &pause, time), bars("from cut to cut", &epoch, time), bars("cut to commit", &commit, time)]
}

/// Widest bar, in characters.
const BAR: usize = 20;

fn bars(title: &str, histogram: &Histogram, unit: fn(u64) -> String) -> Vec<String> {
    let mut lines = vec![format!("{title} ({} s): {}", WINDOW.as_secs(), histogram.count)];
    if histogram.count == 0 {
        return lines;
    }
    let [p50, p99] = [0.5, 0.99].map(|rank| unit(histogram.quantile(rank)));
    lines.push(format!("p50 ≤ {p50}  p99 ≤ {p99}"));
    let most = histogram.buckets.iter().map(|b| b.count).max().unwrap_or(1).max(1);
    for bucket in &histogram.buckets {
        let label = bucket.up_to.map_or_else(|| "more".into(), |up_to| format!("≤ {}", unit(up_to)));
        // A range with anything in it has at least the thinnest bar.
        let eighths = (bucket.count * 8 * BAR as u64).div_ceil(most) as usize;
        let mut bar = "█".repeat(eighths / 8);
        bar.push_str(["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"][eighths % 8]);
        lines.push(format!("{label:>9} {bar} {}", bucket.count));
    }
    lines
}

/// Blocks of lines in columns, as many beside each other as the width allows.
fn beside(blocks: &[Vec<String>], width: usize, height: usize) -> Vec<String> {
    const COLUMN: usize = 9 + 1 + BAR + 1 + 7;
    let across = (width / COLUMN).clamp(1, blocks.len().max(1));
    let mut lines = Vec::new();
    for row in blocks.chunks(across) {
        let deepest = row.iter().map(Vec::len).max().unwrap_or(0);
        for i in 0..deepest {
            let cells = row.iter().map(|block| block.get(i).map_or("", String::as_str));
            let line: String = cells.map(|cell| format!("{cell:<COLUMN$}")).collect();
            lines.push(line.trim_end().to_owned());
        }
        lines.push(String::new());
    }
    lines.truncate(height);
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::testing::{receiver, sender};

    fn later(mut sample: Sample, from: &Sample, seconds: u64) -> Sample {
        sample.at = from.at + Duration::from_secs(seconds);
        sample
    }

    #[test]
    fn the_screen_fits_and_shows_what_happened_since_the_earlier_sample() {
        let before = sender();
        let mut now = later(sender(), &before, 2);
        {
            let status = now.replicator.as_mut().unwrap();
            status.epochs += 80;
            status.wire_bytes += 3_000_000;
            let pause = &mut status.statistics.pause_us;
            pause.buckets[0].count += 79;
            pause.buckets.push(Bucket { up_to: Some(3000), count: 1 });
            (pause.count, pause.max) = (pause.count + 80, 2500);
        }
        let screen = draw(&before, &now, 120, 40).join("\n");
        for shown in [
            "40.0/s",
            "wire 1.5 MB/s",
            "protected",
            "capture auto: copied in the pause",
            "pause (10 s): 80",
            "lag 12 ms",
        ] {
            assert!(screen.contains(shown), "{shown:?} is not in\n{screen}");
        }
        let bar = "█".repeat(BAR);
        assert!(screen.contains(&format!("≤ 100 µs {bar} 79")) && screen.contains("≤ 3 ms ▍ 1"), "{screen}");
        assert!(!screen.contains("≤ 2 ms"), "what was before is not shown:\n{screen}");
        for (width, height) in [(120, 40), (80, 24), (20, 5), (1, 1)] {
            let lines = draw(&before, &now, width, height);
            assert_eq!(lines.len(), height);
            assert!(lines.iter().all(|line| line.chars().count() <= width));
        }
        let line = line(&before, &now);
        assert!(
            line.contains("epochs/s=40.0") && line.contains("pause-p99=2.5ms") && line.contains("wire=1.5MB/s"),
            "{line}"
        );
    }

    #[test]
    fn the_paths_to_the_peer_and_the_cards_are_shown() {
        let before = {
            let mut sample = sender();
            let path = |address: &str, works| PathStatus {
                address: address.into(),
                works,
                active: works,
                since_ms: 3200,
                why: if works { String::new() } else { "it is silent".into() },
                rtt_us: 210,
                ..PathStatus::default()
            };
            sample.replicator.as_mut().unwrap().paths = vec![path("10.0.1.2:1", true), path("10.0.2.2:1", false)];
            sample
        };
        let mut now = later(sender(), &before, 2);
        now.replicator.as_mut().unwrap().paths = before.replicator.as_ref().unwrap().paths.clone();
        now.replicator.as_mut().unwrap().paths[0].sent_bytes = 2_000_000;
        let mut nic = before.vmm.as_ref().unwrap().nics[0].clone();
        nic.out_bytes = 4_000_000;
        let buckets = vec![Bucket { up_to: Some(3000), count: 9 }];
        nic.held_us = Histogram { count: 9, sum: 9000, max: 2900, buckets };
        now.vmm.as_mut().unwrap().nics = vec![nic];
        let screen = draw(&before, &now, 160, 40).join("\n");
        for shown in [
            "path     10.0.1.2:1 carries the data, up for 3.2 s   round trip 210 µs   out 1 MB/s   in 0 B/s",
            "path     10.0.2.2:1 MISSING for 3.2 s: it is silent",
            "ALARM    1 of 2 paths",
            "card     net0 up   out 2 MB/s   in 0 B/s   held 0 B   waited p50 ≤ 2.9 ms  p99 ≤ 2.9 ms",
        ] {
            assert!(screen.contains(shown), "{shown:?} is not in\n{screen}");
        }
        assert!(line(&before, &now).contains(" paths=1/2"));
        assert!(!draw(&sender(), &later(sender(), &before, 2), 160, 40).join("\n").contains("path "));
    }

    #[test]
    fn a_new_process_or_another_role_is_not_compared_with_the_old() {
        let before = sender();
        let restarted = later(sender(), &before, 2);
        let mut older = sender();
        older.at = before.at;
        older.replicator.as_mut().unwrap().wire_bytes = u64::MAX;
        let between = Between::new(&older, &restarted).unwrap();
        assert!(between.rate(|s| s.wire_bytes).is_none());
        assert_eq!(between.histogram(|s| &s.statistics.pause_us).count, 100);
        let now = later(receiver(), &before, 2);
        assert!(draw(&before, &now, 80, 24).join("\n").contains("arrival to applied"));
    }

    #[test]
    fn a_replicator_that_does_not_answer_is_said_to_be_so() {
        let before = sender();
        let mut now = later(sender(), &before, 1);
        now.replicator = Err("cannot talk to it".into());
        assert!(draw(&before, &now, 80, 24).join("\n").contains("cannot talk to it"));
        assert_eq!(line(&before, &now), "cannot talk to it");
    }

    #[test]
    fn the_past_reaches_back_over_the_window_and_no_further() {
        let mut past = Past::default();
        let first = sender();
        let start = first.at;
        past.add(first);
        for second in 1..60 {
            let mut sample = sender();
            sample.at = start + Duration::from_secs(second);
            past.add(sample);
        }
        let kept = past.samples.back().unwrap().at.duration_since(past.samples.front().unwrap().at);
        assert_eq!(kept, WINDOW);
    }
}
