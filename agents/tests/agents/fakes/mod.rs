//! Stand-ins for the programs that the agents start. What they are told, they write to `requests` beside their socket; how they
//! misbehave is said by files in the node's directory `behaviour`.

use std::fs::{self, OpenOptions};
use std::io::{BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use understudy_protocol::control::{encode_line, read_line};
use understudy_protocol::layout::Layout;

/// The fake of this name.
pub fn by_name(name: &str) -> Option<fn() -> i32> {
    match name {
        "understudy-vmm" => Some(vmm),
        "understudy-replicator" => Some(replicator),
        "understudy-serial" => Some(serial),
        "understudy-monitor" => Some(monitor),
        "crm_attribute" | "cibadmin" | "crm_node" | "attrd_updater" => Some(cluster_tool),
        "understudy-evacuator" => Some(evacuator),
        _ => None,
    }
}

fn option(name: &str) -> Option<String> {
    let mut words = std::env::args();
    words.find(|w| w == name)?;
    words.next()
}

fn layout() -> Layout {
    let machine = option("--machine").expect("--machine");
    let run_root = option("--run-root").expect("--run-root");
    let shm_root = option("--shm-root").unwrap_or_else(|| run_root.clone());
    Layout::new(run_root, shm_root, &machine)
}

/// The node's directory is the parent of its run root.
fn behaviour(name: &str) -> Option<String> {
    let run_root = PathBuf::from(option("--run-root")?);
    fs::read_to_string(run_root.parent()?.join("behaviour").join(name)).ok()
}

fn note(path: &Path, text: &str) {
    let mut file = OpenOptions::new().append(true).create(true).open(path).unwrap();
    file.write_all(format!("{text}\n").as_bytes()).unwrap();
}

fn ignore_sigterm() {
    // Blocked signals stay pending: as deaf as a process gets without being stopped.
    let mut set = nix::sys::signal::SigSet::empty();
    set.add(nix::sys::signal::Signal::SIGTERM);
    set.thread_block().unwrap();
}

/// Serve `answer` on `socket` until it says to exit.
fn serve(socket: &Path, requests: PathBuf, answer: impl FnMut(&Value) -> Answer + Send + 'static) -> i32 {
    if behaviour("ignores-sigterm").is_some() {
        ignore_sigterm();
    }
    let listener = UnixListener::bind(socket).unwrap();
    let answer = Arc::new(Mutex::new(answer));
    for stream in listener.incoming() {
        let (answer, requests, socket) = (answer.clone(), requests.clone(), socket.to_owned());
        std::thread::spawn(move || converse(stream.unwrap(), &requests, &socket, &*answer));
    }
    0
}

fn converse(mut stream: UnixStream, requests: &Path, socket: &Path, answer: &Mutex<impl FnMut(&Value) -> Answer>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    while let Ok(Some(line)) = read_line(&mut reader) {
        let request: Value = serde_json::from_slice(&line).unwrap();
        if request["cmd"] != "status" {
            note(requests, &request.to_string());
        }
        let reply = (answer.lock().unwrap())(&request);
        match reply {
            Answer::Ok(value) => stream.write_all(&encode_line(&json!({ "ok": value }))).unwrap(),
            Answer::No(why) => stream.write_all(&encode_line(&json!({ "error": why }))).unwrap(),
            Answer::Exit => {
                let _ = fs::remove_file(socket);
                let _ = stream.write_all(&encode_line(&json!({ "ok": null })));
                std::process::exit(0);
            }
        }
    }
}

enum Answer {
    Ok(Value),
    No(String),
    Exit,
}

fn vmm() -> i32 {
    if let Some(words) = behaviour("vmm-dies") {
        eprintln!("{}", words.trim());
        return 1;
    }
    let layout = layout();
    fs::create_dir_all(layout.shm_dir()).unwrap();
    fs::write(layout.ram(), "ram").unwrap();
    let standby = std::env::args().any(|a| a == "--standby");
    let mut state = if standby { "standby" } else { "running" };
    let mut generation = u64::from(!standby);
    let name = option("--machine").unwrap();
    serve(&layout.vmm_socket(), layout.run_dir().join("vmm.requests"), move |request| match request["cmd"].as_str() {
        Some("status") => Answer::Ok(json!({
            "machine": name, "state": behaviour("vmm-state").map_or(state.to_owned(), |s| s.trim().to_owned()),
            "generation": generation, "gate": "hold", "vcpus": 1, "ram_bytes": 4096, "vm_time_ns": 0, "last_cut": 0,
            "last_committed": 0, "replicated": false, "kvm_backend": "fake", "resets": 0, "serial": [], "recent_pauses_us": [],
            "watchdog": behaviour("watchdog").map(|state| json!({
                "model": "i6300esb", "action": "report", "state": state, "timeout_ms": 30_000, "fed_ms_ago": 47_000, "expired_ms_ago": null,
                "expirations": 1
            })),
        })),
        Some("promote") => match behaviour("vmm-refuses") {
            Some(why) => Answer::No(why.trim().to_owned()),
            None => {
                state = "running";
                generation = request["generation"].as_u64().unwrap();
                Answer::Ok(Value::Null)
            }
        },
        Some("power-button") => {
            if behaviour("guest-ignores-power-button").is_none() {
                state = "shut-down";
            }
            Answer::Ok(Value::Null)
        }
        Some("pause") => match behaviour("vmm-does-not-pause") {
            Some(why) => Answer::No(why.trim().to_owned()),
            None => {
                state = "paused";
                Answer::Ok(Value::Null)
            }
        },
        Some("resume") => {
            state = "running";
            Answer::Ok(Value::Null)
        }
        Some("quit") if behaviour("ignores-quit").is_none() => Answer::Exit,
        _ => Answer::Ok(Value::Null),
    })
}

fn replicator() -> i32 {
    let word = std::env::args().nth(1).unwrap_or_default();
    if word == "serve-migrations" {
        return migrations();
    }
    let layout = layout();
    let taken = || {
        behaviour("image").map_or(
            json!({ "image": null }),
            |image| json!({ "image": serde_json::from_str::<Value>(&image).unwrap() }),
        )
    };
    if std::env::args().nth(1).as_deref() == Some("take-over") {
        note(&layout.run_dir().join("replicator.requests"), &std::env::args().skip(1).collect::<Vec<_>>().join(" "));
        println!("{}", taken());
        return 0;
    }
    if word == "discard" || word == "migrate" {
        note(&layout.run_dir().join("replicator.requests"), &std::env::args().skip(1).collect::<Vec<_>>().join(" "));
        return if word == "migrate" { migrate() } else { 0 };
    }
    let name = option("--machine").unwrap();
    let mut role = "receiver";
    serve(
        &layout.replicator_socket(),
        layout.run_dir().join("replicator.requests"),
        move |request| match request["cmd"].as_str() {
            Some("status") => Answer::Ok(json!({
                "machine": name, "role": role, "replica": behaviour("replica").map_or("Inconsistent".to_owned(), |s| s.trim().to_owned()),
                "source": "Collapsed", "connected": behaviour("connected").is_some(), "peer": null, "generation": 0,
                "committed": 0, "current": 0, "lag_ms": 0, "vetoed": false, "protected": behaviour("protected").is_some(),
                "sync_progress": 0.0, "last_sync_ms": 0, "raw_bytes": 0, "wire_bytes": 0, "epochs": 0, "losses": 0,
                "pause_p50_us": 0, "pause_p99_us": 0, "pause_max_us": 0, "note": ""
            })),
            Some("promote") => {
                role = "sender";
                Answer::Ok(Value::Null)
            }
            Some("demote") => {
                role = "receiver";
                Answer::Ok(Value::Null)
            }
            Some("hand-over") => match behaviour("no-hand-over") {
                Some(why) => Answer::No(why.trim().to_owned()),
                None => Answer::Ok(json!({ "epoch": 77 })),
            },
            Some("take-over") => Answer::Ok(taken()),
            Some("quit") => Answer::Exit,
            _ => Answer::No("what?".into()),
        },
    )
}

/// What becomes of a migration is said by `migration`: `done`, `done, and then it fails`, `hangs` (until its standard input closes), or
/// why it fails.
fn migrate() -> i32 {
    let hand_over = || {
        let run_root = PathBuf::from(option("--run-root").unwrap());
        fs::write(run_root.parent().unwrap().join("behaviour/vmm-state"), "handed-over").unwrap();
    };
    let fails = |why: &str| {
        println!("{}", json!({ "phase": "failed", "why": why }));
        1
    };
    println!("{}", json!({ "phase": "connecting" }));
    match behaviour("migration").unwrap_or_default().trim() {
        "done" => {
            hand_over();
            println!("{}", json!({ "phase": "done", "epoch": 1, "rounds": 2, "stood_still_ms": 3 }));
            0
        }
        "done, and then it fails" => {
            hand_over();
            fails("it was killed")
        }
        "hangs" => {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            fails("it was cancelled")
        }
        why => fails(why),
    }
}

/// The evacuation controller.
fn evacuator() -> i32 {
    let files = understudy_protocol::evacuator::EvacuatorFiles::below(option("--run-root").unwrap());
    let node = option("--node");
    serve(&files.socket(), files.dir().join("requests"), move |request| match request["cmd"].as_str() {
        Some("status") => {
            let last: u64 = behaviour("last-round-ms").map_or(0, |ms| ms.trim().parse().unwrap());
            Answer::Ok(json!({
                "node": node, "rounds": 1, "last_round_ms": last, "open_plans": 0, "without_host": 0, "trouble": "no cluster"
            }))
        }
        Some("quit") => Answer::Exit,
        _ => Answer::No("what?".into()),
    })
}

/// Receives migrations.
fn migrations() -> i32 {
    let run_root = option("--run-root").unwrap();
    let layout = Layout::new(&run_root, option("--shm-root").unwrap(), ".migrations");
    let (node, listen) = (option("--node"), option("--listen"));
    serve(
        &layout.replicator_socket(),
        layout.run_dir().join("replicator.requests"),
        move |request| match request["cmd"].as_str() {
            Some("status") => {
                Answer::Ok(json!({ "node": node, "listen": listen, "incoming": [], "handed_over": 0, "note": "" }))
            }
            Some("quit") => Answer::Exit,
            _ => Answer::No("what?".into()),
        },
    )
}

/// A node's monitor.
fn monitor() -> i32 {
    let root = PathBuf::from(option("--run-root").unwrap());
    let (node, line) = (option("--node"), std::env::args().skip(1).collect::<Vec<_>>().join(" "));
    let dir = root.join(".monitor");
    note(&dir.join("monitor.requests"), &line);
    serve(&dir.join("monitor.sock"), dir.join("monitor.requests"), move |request| match request["cmd"].as_str() {
        Some("status") => Answer::Ok(json!({
            "node": node, "speaks": true, "waits_for": null, "judged": [], "refused": 0, "last_refused": null
        })),
        Some("quit") if behaviour("ignores-quit").is_none() => Answer::Exit,
        _ => Answer::No("what?".into()),
    })
}

fn serial() -> i32 {
    let layout = layout();
    let device = option("--device").unwrap();
    let (machine, line, listen) = (option("--machine"), option("--line"), option("--listen"));
    serve(&layout.serial_socket(&device), layout.run_dir().join("serial.requests"), move |request| match request["cmd"]
        .as_str()
    {
        Some("status") => Answer::Ok(json!({
            "machine": machine, "device": device, "line": line, "line_open": true, "listen": listen, "incarnation": 1,
            "generation": 0, "life": 0, "owner": null, "last_heard_ms": null, "applied": 0, "pending": 0, "input_base": 0,
            "input_end": 0, "input_capacity": 1, "sessions": 0, "attaches": 0, "refusals": 0, "events": []
        })),
        Some("quit") => Answer::Exit,
        _ => Answer::No("what?".into()),
    })
}

/// Notes its arguments in `cluster.calls` beside itself; `cibadmin --query` prints `cib.xml` from there.
fn cluster_tool() -> i32 {
    let me = PathBuf::from(std::env::args().next().unwrap());
    let dir = me.parent().unwrap();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    note(&dir.join("cluster.calls"), &format!("{} {}", me.file_name().unwrap().to_string_lossy(), arguments.join(" ")));
    if me.ends_with("crm_node") {
        println!("n1");
    }
    if me.ends_with("cibadmin") && arguments.iter().any(|a| a == "--query") {
        match fs::read_to_string(dir.join("cib.xml")) {
            Ok(text) => println!("{text}"),
            Err(_) => {
                eprintln!("Could not connect to the CIB: Transport endpoint is not connected");
                return 102;
            }
        }
    }
    0
}
