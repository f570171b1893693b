//! Hooks, gateways and commands: a plain HTTP listener and shell scripts at the other end. And the agent, run as Pacemaker runs it.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command as Process, Output};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use understudy_alerts::alarm::{Alarm, Severity, Sink};
use understudy_alerts::deliver::{Command, Gateway, Webhook, sink};
use understudy_alerts::settings::{Delivery, Hook, Kind, Recipient, Sms};

const TIMEOUT: Duration = Duration::from_secs(20);

fn alarm() -> Alarm {
    let alarm = Alarm::new(Severity::Warning, "vm-web1 failed on n1", "It failed.").machine("web1").key("k");
    Alarm { short: Some("web1 failed".into()), ..alarm }
}

/// Answers one request with `answer`; what it was: its head, and its body.
fn listener(answer: &'static str) -> (String, JoinHandle<(String, String)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/alerts", listener.local_addr().unwrap());
    let thread = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut reader = BufReader::new(stream);
        let (mut head, mut length) = (String::new(), 0);
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            if line.trim().is_empty() {
                break;
            }
            head.push_str(&line);
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        reader.get_mut().write_all(answer.as_bytes()).unwrap();
        (head, String::from_utf8(body).unwrap())
    });
    (url, thread)
}

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";

#[test]
fn a_webhook_gets_all_of_it_as_json_with_the_token() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("token"), "s3cret\n").unwrap();
    let (url, thread) = listener(OK);
    let settings = Hook { token_file: Some(dir.path().join("token")), ca_file: None };
    Webhook { url: &url, settings: &settings, timeout: TIMEOUT }.tell(&alarm()).unwrap();
    let (head, body) = thread.join().unwrap();
    assert!(head.starts_with("POST /alerts HTTP/1.1\r\n"), "{head}");
    assert!(head.to_lowercase().contains("authorization: bearer s3cret\r\n"), "{head}");
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((body["subject"].as_str(), body["severity"].as_str()), (Some("vm-web1 failed on n1"), Some("warning")));
    assert_eq!((body["machine"].as_str(), body["key"].as_str()), (Some("web1"), Some("k")));
}

#[test]
fn a_gateway_gets_number_and_short_text() {
    let (url, thread) = listener(OK);
    let recipient = Recipient {
        name: "a".into(),
        kind: Kind::Sms,
        to: "+4930123456".into(),
        approves: false,
        severity: Severity::Info,
        window: 0,
    };
    let delivery = Delivery { sms: Sms { url: Some(url), command: None }, ..Delivery::default() };
    sink(&recipient, &delivery, TIMEOUT).tell(&alarm()).unwrap();
    let body: Value = serde_json::from_str(&thread.join().unwrap().1).unwrap();
    assert_eq!(body, serde_json::json!({ "to": "+4930123456", "text": "web1 failed" }));
    let nowhere = sink(&recipient, &Delivery::default(), TIMEOUT).tell(&alarm()).unwrap_err();
    assert!(nowhere.lasting && nowhere.text.contains("say [sms] command or url"), "{nowhere}");
}

#[test]
fn what_a_server_answers_decides_whether_it_may_work_later() {
    let answers = [
        ("HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", false, "503"),
        ("HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", true, "404"),
        // Not followed: it might lead anywhere.
        ("HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", true, "302"),
        ("nonsense\r\n\r\n", false, "cannot reach"),
    ];
    for (answer, lasting, words) in answers {
        let (url, thread) = listener(answer);
        let trouble = Webhook { url: &url, settings: &Hook::default(), timeout: TIMEOUT }.tell(&alarm()).unwrap_err();
        assert!(trouble.lasting == lasting && trouble.text.contains(words), "{trouble:?}");
        thread.join().unwrap();
    }
}

#[test]
fn a_server_that_says_nothing_does_not_hold_us() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/", silent.local_addr().unwrap());
    let settings = Hook::default();
    let gateway = Gateway { url: &url, to: "+49", settings: &settings, timeout: Duration::from_millis(300) };
    let began = Instant::now();
    let trouble = gateway.tell(&alarm()).unwrap_err();
    assert!(!trouble.lasting && began.elapsed() < Duration::from_secs(15), "{trouble}");
}

fn script(dir: &Path, name: &str, text: &str) -> PathBuf {
    let (plain, path) = (dir.join(format!("{name}.text")), dir.join(name));
    fs::write(&plain, format!("#!/bin/sh\n{text}\n")).unwrap();
    // Written by a process of its own: a child that another test forks would hold a file that is open for writing here, and it could not be run (ETXTBSY).
    let made = Process::new("install").arg("-m755").args([&plain, &path]).status().unwrap();
    assert!(made.success());
    path
}

#[test]
fn a_command_gets_the_text_and_the_rest_in_its_environment() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let program = script(
        dir.path(),
        "tell",
        &format!("echo \"$1 $UNDERSTUDY_ALERT_SEVERITY $UNDERSTUDY_ALERT_MACHINE\" > {0}; cat >> {0}", out.display()),
    );
    let arguments = ["+49".to_owned()];
    let command = |short| Command { program: &program, arguments: &arguments, short, timeout: TIMEOUT };
    command(false).tell(&alarm()).unwrap();
    assert_eq!(fs::read_to_string(&out).unwrap(), "+49 warning web1\nIt failed.");
    command(true).tell(&alarm()).unwrap();
    assert_eq!(fs::read_to_string(&out).unwrap(), "+49 warning web1\nweb1 failed");
}

#[test]
fn a_command_that_fails_is_quoted_and_one_that_hangs_is_killed_with_its_children() {
    let dir = tempfile::tempdir().unwrap();
    let fails = script(dir.path(), "fails", "sleep 30 & echo no modem >&2; exit 3");
    let tell = |program: &Path, timeout| {
        Command { program, arguments: &[], short: false, timeout }.tell(&alarm()).unwrap_err()
    };
    let began = Instant::now();
    assert!(tell(&fails, TIMEOUT).text.contains("failed (exit status: 3): no modem"));
    // What it left behind holds its standard error open.
    assert!(began.elapsed() < Duration::from_secs(15));
    assert!(tell(Path::new("/nowhere"), TIMEOUT).text.contains("cannot start /nowhere"));
    // The child holds standard error open: without the group's end we would wait for it.
    let hangs = script(dir.path(), "hangs", "sleep 1000 & wait");
    let began = Instant::now();
    let trouble = tell(&hangs, Duration::from_millis(200));
    assert!(trouble.text.contains("was killed") && began.elapsed() < Duration::from_secs(15), "{trouble}");
}

/// As Pacemaker calls it.
fn agent(spool: &Path, pairs: &[(&str, &str)]) -> Output {
    let mut agent = Process::new(env!("CARGO_BIN_EXE_understudy-alert"));
    agent.env("UNDERSTUDY_ALERT_SPOOL", spool).envs(pairs.iter().copied()).output().unwrap()
}

#[test]
fn the_agent_queues_and_ends_and_the_sender_it_leaves_behind_tells() {
    let dir = tempfile::tempdir().unwrap();
    let spool = dir.path().join("alerts");
    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // Waits until somebody reads: the agent must not.
    let program = script(dir.path(), "tell", &format!("echo \"$UNDERSTUDY_ALERT_SUBJECT\" > {}", pipe.display()));
    let event = |desc| {
        let to = program.to_str().unwrap().to_owned();
        [
            ("CRM_alert_kind", "node".to_owned()),
            ("CRM_alert_node", "n1".into()),
            ("CRM_alert_desc", desc),
            ("CRM_alert_recipient", to),
            ("kind", "command".into()),
        ]
    };
    let call = |desc: &str| {
        let event = event(desc.to_owned());
        agent(&spool, &event.iter().map(|(n, v)| (*n, v.as_str())).collect::<Vec<_>>())
    };
    let output = call("lost");
    assert!(output.status.success(), "{output:?}");
    // Only information, and this recipient wants warnings.
    assert!(call("member").status.success());
    assert_eq!(fs::read_to_string(&pipe).unwrap(), "node n1 is lost\n");
    let journal = fs::read_to_string(spool.join("journal.jsonl")).unwrap();
    assert_eq!(journal.matches("\"queued\"").count(), 1, "{journal}");
}

#[test]
fn the_agent_says_what_is_wrong_and_is_content_without_recipients() {
    let dir = tempfile::tempdir().unwrap();
    let spool = dir.path().join("alerts");
    assert!(agent(&spool, &[("CRM_alert_kind", "node")]).status.success());
    let wrong = agent(&spool, &[("CRM_alert_kind", "node"), ("CRM_alert_recipient", "x"), ("kind", "pigeon")]);
    let said = String::from_utf8(wrong.stderr).unwrap();
    assert!(!wrong.status.success() && said.contains("mail, sms, webhook or command is needed"), "{said}");
    let full = dir.path().join("file");
    fs::write(&full, "").unwrap();
    let nowhere = agent(
        &full,
        &[("CRM_alert_kind", "node"), ("CRM_alert_desc", "lost"), ("CRM_alert_recipient", "x@y"), ("kind", "mail")],
    );
    let said = String::from_utf8(nowhere.stderr).unwrap();
    assert!(!nowhere.status.success() && said.contains("install -d -o hacluster"), "{said}");
}
