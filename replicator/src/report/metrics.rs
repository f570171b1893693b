//! A sample in Prometheus' text exposition format (version 0.0.4), for node_exporter's textfile collector or a scrape.
//!
//! Every metric is labelled with the machine. The families are always written in the same order and, as far as the processes
//! answer, all of them: a series does not come and go with its value. docs/operations.md lists them.

use std::fmt::{Display, Write as _};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use understudy_protocol::control::{
    Gate, NicStatus, PathStatus, ReplicaState, ReplicatorStatus, Role, SerialStatus, SourceState, VmmState, VmmStatus,
};
use understudy_protocol::layout::Layout;
use understudy_protocol::statistics::{Histogram, RANGES, SIZES, TIMES_US};
use understudy_protocol::watchdog::WatchdogState;

use super::Sample;

/// What the text is, for HTTP.
const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The whole text.
pub fn exposition(machine: &str, sample: &Sample) -> String {
    let mut out = Exposition { text: String::new(), machine: escape(machine) };
    out.gauge("understudy_replicator_up", "Whether the replicator answers.", f64::from(sample.replicator.is_ok()));
    if let Ok(status) = &sample.replicator {
        replicator(&mut out, status);
    }
    out.gauge("understudy_vmm_up", "Whether the VMM answers.", f64::from(sample.vmm.is_ok()));
    if let Ok(status) = &sample.vmm {
        vmm(&mut out, status);
    }
    out.text
}

/// One series for each network path to the other side, where there are several.
fn paths(out: &mut Exposition, paths: &[PathStatus]) {
    if paths.is_empty() {
        return;
    }
    let mut family = |name: &str, kind: &str, help: &str, value: fn(&PathStatus) -> f64| {
        let values = paths.iter().map(|path| (path.address.clone(), value(path)));
        out.labelled(&format!("understudy_replicator_path_{name}"), kind, help, "path", values);
    };
    family("up", "gauge", "Whether the path is connected and answers.", |p| f64::from(p.works));
    family("active", "gauge", "Whether the path carries the checkpoints.", |p| f64::from(p.active));
    family("losses_total", "counter", "Times that it went missing in this session.", |p| p.losses as f64);
    family("sent_bytes_total", "counter", "Bytes sent on it in this session.", |p| p.sent_bytes as f64);
    family("received_bytes_total", "counter", "Bytes received on it in this session.", |p| p.received_bytes as f64);
    family("again_bytes_total", "counter", "Bytes sent on it that had been sent before.", |p| p.again_bytes as f64);
    family("round_trip_seconds", "gauge", "Round trip, smoothed.", |p| p.rtt_us as f64 / 1e6);
}

fn replicator(out: &mut Exposition, status: &ReplicatorStatus) {
    let (statistics, yes) = (&status.statistics, |value: bool| f64::from(value));
    let role = |role| if role == Role::Sender { "sender" } else { "receiver" };
    out.states(
        "understudy_replicator_role",
        "1 for the role that the replicator has.",
        "role",
        &[Role::Sender, Role::Receiver].map(|r| (role(r).to_owned(), r == status.role)),
    );
    let replicas = [ReplicaState::Inconsistent, ReplicaState::Syncing, ReplicaState::UpToDate, ReplicaState::Outdated];
    out.states(
        "understudy_replicator_replica_state",
        "1 for the state of the replica: the own image of a receiver, the peer's of a sender.",
        "state",
        &replicas.map(|state| (format!("{state:?}"), state == status.replica)),
    );
    use SourceState::{Collapsed, Migrating, Running, Separating, Startup};
    out.states(
        "understudy_replicator_source_state",
        "1 for the state of the source.",
        "state",
        &[Startup, Migrating, Separating, Collapsed, Running].map(|s| (format!("{s:?}"), s == status.source)),
    );
    let gauges = [
        ("connected", "Whether the other side is connected.", yes(status.connected)),
        (
            "protected",
            "Sender: whether a standby holds the newest committed epoch and outputs wait for it.",
            yes(status.protected),
        ),
        ("vetoed", "Sender: whether a durable veto against the standby stands.", yes(status.vetoed)),
        ("generation", "Generation of the machine or of the image.", status.generation.0 as f64),
        ("committed_epoch", "Newest committed epoch.", status.committed.0 as f64),
        ("current_epoch", "Newest epoch cut (sender) or begun (receiver).", status.current.0 as f64),
        ("epochs_in_flight", "Sender: epochs cut and not yet acknowledged.", statistics.in_flight as f64),
        ("lag_seconds", "Time since the last commit.", status.lag_ms as f64 / 1e3),
        ("first_copy_ratio", "Progress of the first copy, 0 to 1.", status.sync_progress),
        ("first_copy_seconds", "Duration of the last complete first copy.", status.last_sync_ms as f64 / 1e3),
    ];
    for (name, help, value) in gauges {
        out.gauge(&format!("understudy_replicator_{name}"), help, value);
    }
    let counters = [
        ("epochs", "Epochs committed since the replicator started.", status.epochs),
        (
            "protection_losses",
            "Times that protection was lost (sender) or the sender was lost (receiver).",
            status.losses,
        ),
        ("captured_bytes", "Sender: pages and device state taken from the VMM.", statistics.bytes.captured),
        ("raw_bytes", "Pages and device state before encoding, first copies included.", status.raw_bytes),
        (
            "changed_bytes",
            "Sender: of these, pages neither zero nor as the standby has them.",
            statistics.bytes.changed,
        ),
        ("encoded_bytes", "Sender: what is left of these as changes, references and pages.", statistics.bytes.encoded),
        ("compressed_bytes", "Sender: the same after compression, if there was any.", statistics.bytes.compressed),
        ("wire_bytes", "As encoded and framed: sent or received.", status.wire_bytes),
        ("committed_bytes", "Of the wire bytes, those of committed epochs.", statistics.bytes.committed),
    ];
    for (name, help, value) in counters {
        out.counter(&format!("understudy_replicator_{name}_total"), help, value as f64);
    }
    paths(out, &status.paths);
    let encoding = &statistics.encoding;
    let pages = [
        ("unchanged", encoding.unchanged_pages),
        ("zero", encoding.zero_pages),
        ("delta", encoding.delta_pages),
        ("same", encoding.same_pages),
        ("raw", encoding.raw_pages),
    ];
    let pages = pages.map(|(how, count)| (how.to_owned(), count as f64)).into_iter();
    let help = "Sender: pages by how they were encoded.";
    out.labelled("understudy_replicator_encoded_pages_total", "counter", help, "as", pages);
    let help = "Sender: memory for copies of pages that were sent.";
    out.gauge("understudy_replicator_shadow_bytes", help, encoding.shadow_bytes as f64);
    let verify = &status.verify;
    out.gauge(
        "understudy_replicator_verify_running",
        "Sender: whether RAM is being compared now.",
        yes(verify.running),
    );
    let verified = [
        ("passes", "Sender: comparisons of all RAM that found no difference.", verify.passes),
        ("failures", "Comparisons that found a difference; each costs the standby's image.", verify.failures),
        ("compared_pages", "Pages compared.", verify.compared_pages),
        ("differing_pages", "Pages that differed.", verify.differing_pages),
    ];
    for (name, help, value) in verified {
        out.counter(&format!("understudy_replicator_verify_{name}_total"), help, value as f64);
    }
    let ago = verify.last_ended_s.map_or(-1.0, |s| s as f64);
    let help = "Sender: time since the last comparison of all RAM ended, -1 if there was none.";
    out.gauge("understudy_replicator_verify_age_seconds", help, ago);
    let times = [
        ("pause_seconds", "Sender: how long the vCPUs stood still for a cut.", &statistics.pause_us),
        ("epoch_seconds", "Sender: time from one cut to the next.", &statistics.epoch_us),
        (
            "commit_seconds",
            "Sender: from cut to acknowledgement. Receiver: from arrival to applied.",
            &statistics.commit_us,
        ),
    ];
    for (name, help, histogram) in times {
        out.histogram(&format!("understudy_replicator_{name}"), help, &[(None, histogram)], &TIMES_US, 1e6);
    }
    let help = "Bytes of an epoch on the wire.";
    out.histogram("understudy_replicator_epoch_bytes", help, &[(None, &statistics.epoch_bytes)], &SIZES, 1.0);
}

fn vmm(out: &mut Exposition, status: &VmmStatus) {
    use VmmState::{Fenced, HandedOver, Paused, Running, ShutDown, Standby};
    out.states(
        "understudy_vmm_state",
        "1 for the state of the machine in this VMM.",
        "state",
        &[Standby, Running, Paused, HandedOver, ShutDown, Fenced].map(|s| (format!("{s:?}"), s == status.state)),
    );
    let open = f64::from(status.gate == Gate::Open);
    out.gauge("understudy_vmm_gate_open", "Whether outputs leave without waiting for a commit.", open);
    out.gauge("understudy_vmm_ram_bytes", "Guest RAM.", status.ram_bytes as f64);
    out.gauge("understudy_vmm_vcpus", "Virtual CPUs.", f64::from(status.vcpus));
    let help = "Time that the machine has run, over all its hosts.";
    out.counter("understudy_vmm_time_seconds_total", help, status.vm_time_ns as f64 / 1e9);
    out.counter("understudy_vmm_resets_total", "Resets by the guest.", status.resets as f64);
    let capture = &status.capture;
    if !capture.strategy.is_empty() {
        let strategy = [(capture.strategy.clone(), true)];
        out.states("understudy_vmm_capture_info", "How checkpoints are captured.", "strategy", &strategy);
    }
    let stood_still = capture.stood_still_us as f64 / 1e6;
    out.counter("understudy_vmm_stood_still_seconds_total", "Time that the guest stood still for cuts.", stood_still);
    out.counter("understudy_vmm_cuts_total", "Cuts.", capture.cuts as f64);
    let help = "Cuts repeated because the guest wrote to pages before their copies were made.";
    out.counter("understudy_vmm_cuts_repeated_total", help, capture.repeated as f64);
    let gauges = [
        ("cut_pages", "Pages in the last cut.", capture.pages),
        ("cut_stopped_pages", "Of these, copied while the guest stood still.", capture.stopped_pages),
        ("cut_hot_pages", "Pages that stay writable and are copied at every cut.", capture.hot_pages),
        ("cut_early_pages", "Pages copied before the last cut.", capture.early_pages),
        ("throttle_percent", "Share of the time that the vCPUs may run.", capture.throttle_percent.into()),
    ];
    for (name, help, value) in gauges {
        out.gauge(&format!("understudy_vmm_{name}"), help, value as f64);
    }
    let ports =
        |value: fn(&SerialStatus) -> u64| status.serial.iter().map(move |port| (port.port.clone(), value(port) as f64));
    let family = "understudy_vmm_serial_sent_bytes_total";
    out.labelled(family, "counter", "Bytes that the guest has sent.", "port", ports(|port| port.tx_bytes));
    let family = "understudy_vmm_serial_received_bytes_total";
    out.labelled(family, "counter", "Bytes that the guest was given.", "port", ports(|port| port.rx_bytes));
    let family = "understudy_vmm_serial_held_bytes";
    out.labelled(family, "gauge", "Bytes that wait for their commit.", "port", ports(|port| port.tx_held));
    if let Some(watchdog) = &status.watchdog {
        let states = [WatchdogState::NotArmed, WatchdogState::Fed, WatchdogState::Expired];
        let values = states.into_iter().zip(["not-armed", "fed", "expired"]);
        let values = values.map(|(state, name)| (name.to_owned(), f64::from(u8::from(state == watchdog.state))));
        let family = "understudy_vmm_watchdog_state";
        out.labelled(
            family,
            "gauge",
            "Whether the guest feeds its watchdog: 1 for the state that it is in.",
            "state",
            values,
        );
        let family = "understudy_vmm_watchdog_expirations_total";
        out.counter(family, "Times that the guest did not feed it.", watchdog.expirations as f64);
    }
    if !status.nics.is_empty() {
        nics(out, &status.nics);
    }
}

/// A family of a card's: the end of its name, its kind, its help, its value.
type NicFamily = (&'static str, &'static str, &'static str, fn(&NicStatus) -> u64);

fn nics(out: &mut Exposition, nics: &[NicStatus]) {
    let families: [NicFamily; 8] = [
        ("up", "gauge", "Whether the machine may speak by this card here.", |nic| u64::from(nic.link == "up")),
        ("sent_packets_total", "counter", "Packets that left.", |nic| nic.out_packets),
        ("sent_bytes_total", "counter", "Bytes of frames that left.", |nic| nic.out_bytes),
        ("received_packets_total", "counter", "Packets that the guest was given.", |nic| nic.in_packets),
        ("received_bytes_total", "counter", "Bytes of frames that the guest was given.", |nic| nic.in_bytes),
        ("held_bytes", "gauge", "Bytes that wait for their commit.", |nic| nic.held_bytes),
        ("bound_reached_total", "counter", "Times that as much waited as may.", |nic| nic.bound_reached),
        ("dropped_packets_total", "counter", "Packets dropped, for whatever reason.", |nic| nic.dropped.values().sum()),
    ];
    for (name, kind, help, value) in families {
        let values = nics.iter().map(|nic| (nic.name.clone(), value(nic) as f64));
        out.labelled(&format!("understudy_vmm_nic_{name}"), kind, help, "nic", values);
    }
    let held: Vec<_> = nics.iter().map(|nic| (Some(("nic", nic.name.as_str())), &nic.held_us)).collect();
    let help = "How long packets waited for their commit.";
    out.histogram("understudy_vmm_nic_held_seconds", help, &held, &TIMES_US, 1e6);
}

struct Exposition {
    text: String,
    machine: String,
}

impl Exposition {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn line(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let _ = write!(self.text, "{name}{{machine=\"{}\"", self.machine);
        for (label, of) in labels {
            let _ = write!(self.text, ",{label}=\"{}\"", escape(of));
        }
        let _ = writeln!(self.text, "}} {value}");
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.family(name, "gauge", help);
        self.line(name, &[], value);
    }

    fn counter(&mut self, name: &str, help: &str, value: f64) {
        self.family(name, "counter", help);
        self.line(name, &[], value);
    }

    fn labelled(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        label: &str,
        values: impl Iterator<Item = (String, f64)>,
    ) {
        self.family(name, kind, help);
        for (of, value) in values {
            self.line(name, &[(label, &of)], value);
        }
    }

    fn states(&mut self, name: &str, help: &str, label: &str, states: &[(String, bool)]) {
        let values = states.iter().map(|(state, is)| (state.clone(), f64::from(*is)));
        self.labelled(name, "gauge", help, label, values);
    }

    /// One of a machine, or several that a label tells apart.
    fn histogram(
        &mut self,
        name: &str,
        help: &str,
        histograms: &[(Option<(&str, &str)>, &Histogram)],
        bounds: &[u64; RANGES],
        unit: f64,
    ) {
        self.family(name, "histogram", help);
        let bucket = format!("{name}_bucket");
        for (label, histogram) in histograms {
            let mut range = |le: &str, count: u64| {
                let labels: Vec<_> = label.iter().copied().chain([("le", le)]).collect();
                self.line(&bucket, &labels, count);
            };
            for bound in bounds {
                range(&(*bound as f64 / unit).to_string(), histogram.count_up_to(*bound));
            }
            range("+Inf", histogram.count);
            let label = label.as_slice();
            self.line(&format!("{name}_sum"), label, histogram.sum as f64 / unit);
            self.line(&format!("{name}_count"), label, histogram.count);
        }
    }
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// One client after the other gets so long.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(2);
/// A request of more bytes is no scrape.
const REQUEST_LIMIT: usize = 8 << 10;

/// Answer `GET /metrics` on `listener` for ever. One client at a time and each for at most some seconds: nothing that
/// somebody does at this door can cost more than that somebody else's scrape.
pub fn serve(listener: &TcpListener, machine: &str, layout: &Layout) -> io::Result<()> {
    loop {
        match listener.accept() {
            Ok((client, _)) => {
                // A client that goes away has no use for the error.
                let _ = answer(client, || exposition(machine, &Sample::take(layout)));
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted) => {}
            Err(e) => return Err(e),
        }
    }
}

fn answer(mut client: TcpStream, text: impl FnOnce() -> String) -> io::Result<()> {
    client.set_write_timeout(Some(CLIENT_TIMEOUT))?;
    let end = std::time::Instant::now() + CLIENT_TIMEOUT;
    let mut request = Vec::new();
    let mut piece = [0; 1024];
    while !request.windows(4).any(|w| w == b"\r\n\r\n") {
        let left = end.saturating_duration_since(std::time::Instant::now());
        if left.is_zero() || request.len() > REQUEST_LIMIT {
            return Ok(());
        }
        client.set_read_timeout(Some(left))?;
        let n = client.read(&mut piece)?;
        if n == 0 {
            return Ok(());
        }
        request.extend_from_slice(&piece[..n]);
    }
    let line = request.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let words: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let (status, body) = match words[..] {
        [b"GET", b"/metrics", ..] => ("200 OK", text()),
        [b"GET", ..] => ("404 Not Found", "only /metrics is here\n".to_owned()),
        _ => ("405 Method Not Allowed", "only GET is understood\n".to_owned()),
    };
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    client.write_all(head.as_bytes())?;
    client.write_all(body.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::report::testing::{receiver, sender};

    /// What the text format demands, for each line.
    fn check(text: &str) -> BTreeSet<String> {
        let mut families = BTreeSet::new();
        let mut current: Option<(String, String)> = None;
        let mut samples = BTreeSet::new();
        for line in text.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, help) = help.split_once(' ').unwrap();
                assert!(families.insert(name.to_owned()), "{name} is there twice");
                assert!(help.ends_with('.'));
                current = Some((name.to_owned(), String::new()));
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').unwrap();
                let family = current.as_mut().unwrap();
                assert_eq!(family.0, name);
                assert!(["gauge", "counter", "histogram"].contains(&kind));
                assert_eq!(kind == "counter", name.ends_with("_total"), "{name}");
                family.1 = kind.to_owned();
            } else {
                let (series, value) = line.rsplit_once(' ').unwrap();
                let (name, labels) = series.split_once('{').unwrap();
                assert!(labels.starts_with("machine=\"m\"") && labels.ends_with('}'), "{line}");
                assert!(value.parse::<f64>().unwrap().is_finite(), "{line}");
                assert!(samples.insert(series.to_owned()), "{series} is there twice");
                let (family, kind) = current.as_ref().unwrap();
                let suffix = name.strip_prefix(family.as_str()).unwrap();
                let suffixes: &[&str] = if kind == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
                assert!(suffixes.contains(&suffix), "{line} in family {family}");
                assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{name}");
            }
        }
        assert!(text.ends_with('\n'));
        families
    }

    #[test]
    fn every_line_is_one_that_prometheus_accepts_and_the_families_do_not_depend_on_the_role() {
        let sending = check(&exposition("m", &sender()));
        assert!(sending.len() > 25, "{sending:?}");
        assert_eq!(check(&exposition("m", &receiver())), sending);
    }

    #[test]
    fn a_watchdog_is_in_one_state() {
        let text = exposition("m", &sender());
        let mine: Vec<_> = text.lines().filter(|line| line.starts_with("understudy_vmm_watchdog")).collect();
        let wanted = [
            "understudy_vmm_watchdog_state{machine=\"m\",state=\"not-armed\"} 0",
            "understudy_vmm_watchdog_state{machine=\"m\",state=\"fed\"} 1",
            "understudy_vmm_watchdog_state{machine=\"m\",state=\"expired\"} 0",
            "understudy_vmm_watchdog_expirations_total{machine=\"m\"} 2",
        ];
        assert_eq!(mine, wanted);
    }

    #[test]
    fn buckets_are_cumulative_and_in_seconds() {
        let text = exposition("m", &sender());
        let value = |series: &str| {
            let line = text.lines().find(|line| line.starts_with(series)).unwrap_or_else(|| panic!("{series}: {text}"));
            line.rsplit_once(' ').unwrap().1.to_owned()
        };
        let bucket =
            |le: &str| value(&format!("understudy_replicator_pause_seconds_bucket{{machine=\"m\",le=\"{le}\"}}"));
        assert_eq!([bucket("0.00007"), bucket("0.0001"), bucket("0.002"), bucket("+Inf")], ["0", "99", "100", "100"]);
        assert_eq!(value("understudy_replicator_pause_seconds_count"), "100");
        assert_eq!(value("understudy_replicator_pause_seconds_sum"), "0.0119");
    }

    #[test]
    fn processes_that_do_not_answer_are_down_and_the_rest_is_absent() {
        let sample = Sample { at: std::time::Instant::now(), replicator: Err("no".into()), vmm: Err("no".into()) };
        let families = check(&exposition("m", &sample));
        assert_eq!(families.into_iter().collect::<Vec<_>>(), ["understudy_replicator_up", "understudy_vmm_up"]);
    }

    #[test]
    fn over_http_only_the_metrics_are_given_out() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ask = |request: &[u8]| {
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            client.write_all(request).unwrap();
            client.shutdown(std::net::Shutdown::Write).unwrap();
            answer(listener.accept().unwrap().0, || "up 1\n".into()).unwrap();
            let mut reply = String::new();
            // (A connection that is closed over unread bytes is reset.)
            let _ = client.read_to_string(&mut reply);
            reply
        };
        let good = ask(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(good.starts_with("HTTP/1.1 200 OK\r\n") && good.ends_with("\r\n\r\nup 1\n"), "{good}");
        assert!(ask(b"GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404 "));
        assert!(ask(b"POST /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405 "));
        assert_eq!(ask(b"GET /metrics"), "", "half a request is no request");
        assert_eq!(ask(&[b'x'; 2 * REQUEST_LIMIT]), "", "an endless one neither");
    }
}
