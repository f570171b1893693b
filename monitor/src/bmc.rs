//! A host's management controller (BMC): its fencing device, asked for the power state and never for more.
//!
//! Devices, their parameters and which hosts they are for are Pacemaker's, read from the CIB; the question is the FenceAgentAPI's: `name=value` lines on
//! the agent's standard input, `action=status`, and the exit status is the answer (0 on, 2 off, any other: it does not answer). What agents print is not
//! kept, and parameters are not logged: there are passwords among them.
//!
//! Levels of the fencing topology are asked in turn until one tells: of its devices one `on` is on, all `off` are off. Without a topology every
//! device is such a level. What cannot be known without asking more (hosts listed by the device itself, secrets that only Pacemaker's executor has, agents that
//! know nothing of power) is not asked: `unknown`.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

use crate::matrix::Bmc;

/// Where Pacemaker has its fence agents.
pub const AGENTS: &str = "/usr/sbin";
/// A host is asked again so long after it has answered.
pub const AGAIN: Duration = Duration::from_secs(10);
/// Longest that an agent may take.
const PATIENCE: Duration = Duration::from_secs(15);
/// Agents that say something else than whether the host has power.
const NOT_OF_POWER: [&str; 6] =
    ["fence_sbd", "fence_watchdog", "fence_scsi", "fence_mpath", "fence_kdump", "fence_heuristics_ping"];

/// A fencing device.
#[derive(Clone, PartialEq, Eq, Default)]
struct Device {
    id: String,
    agent: String,
    parameters: BTreeMap<String, String>,
    off: bool,
}

/// One level of the topology.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Level {
    /// The host; `None` if it is for hosts by pattern or attribute.
    target: Option<String>,
    index: u32,
    devices: Vec<String>,
}

/// The cluster's fencing devices.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Fencing {
    devices: Vec<Device>,
    levels: Vec<Level>,
}

fn attribute(element: &BytesStart<'_>, name: &str) -> Result<Option<String>, String> {
    let bad = |e: quick_xml::Error| format!("the CIB is unreadable: {e}");
    let found = element.try_get_attribute(name).map_err(|e| bad(e.into()))?;
    found.map(|a| a.unescape_value().map(|v| v.into_owned())).transpose().map_err(bad)
}

impl Fencing {
    /// Read a CIB as `cibadmin --query` prints it. The error is a sentence.
    pub fn read(cib: &str) -> Result<Self, String> {
        let mut reader = Reader::from_str(cib);
        let mut fencing = Self::default();
        // Names of the elements that are open; the device whose primitive that is, and how deep.
        let mut open: Vec<Vec<u8>> = Vec::new();
        let mut device: Option<(usize, Device)> = None;
        let mut any = false;
        loop {
            let event = reader.read_event().map_err(|e| format!("the CIB is unreadable: {e}"))?;
            match &event {
                Event::Start(element) | Event::Empty(element) => {
                    any = true;
                    let within = |name: &[u8]| open.iter().any(|o| o == name);
                    if within(b"configuration") {
                        match element.name().as_ref() {
                            b"primitive" if matches!(event, Event::Start(_)) => {
                                device = primitive(element)?.map(|device| (open.len(), device));
                            }
                            b"nvpair" => {
                                if let Some((_, device)) = &mut device {
                                    device.pair(element, within(b"instance_attributes"), within(b"meta_attributes"))?;
                                }
                            }
                            b"fencing-level" => fencing.levels.extend(level(element)?),
                            _ => {}
                        }
                    }
                    if matches!(event, Event::Start(_)) {
                        open.push(element.name().as_ref().to_vec());
                    }
                }
                Event::End(_) => {
                    open.pop();
                    if let Some((_, done)) = device.take_if(|(depth, _)| *depth == open.len()) {
                        fencing.devices.push(done);
                    }
                }
                Event::Eof if any && open.is_empty() => break,
                Event::Eof => return Err("the CIB ends too early".into()),
                _ => {}
            }
        }
        fencing.levels.sort_by_key(|level| level.index);
        Ok(fencing)
    }

    /// Whether the host has power, as far as its devices can tell. Takes a while, within a bound.
    pub fn ask(&self, node: &str, agents: &Path) -> Bmc {
        let mut all = Bmc::Unknown;
        for level in self.levels_of(node) {
            let answers: Vec<Bmc> = level.iter().map(|device| device.ask(node, agents)).collect();
            match together(&answers) {
                Bmc::Unknown => {}
                Bmc::Unreachable => all = Bmc::Unreachable,
                told => return told,
            }
        }
        all
    }

    /// The devices of each level for a host.
    fn levels_of(&self, node: &str) -> Vec<Vec<&Device>> {
        // Whether such a level is for this host, only Pacemaker knows.
        if self.levels.iter().any(|level| level.target.is_none()) {
            return Vec::new();
        }
        let by_id = |id: &String| self.devices.iter().find(|d| d.id == *id);
        let levels = self.levels.iter().filter(|level| level.target.as_deref() == Some(node));
        let levels: Vec<Vec<&Device>> = levels.map(|level| level.devices.iter().filter_map(by_id).collect()).collect();
        if levels.is_empty() { self.devices.iter().map(|device| vec![device]).collect() } else { levels }
    }
}

/// What the devices of one level say together: all supplies of a host must be off.
fn together(answers: &[Bmc]) -> Bmc {
    let has = |answer| answers.contains(&answer);
    if has(Bmc::On) {
        Bmc::On
    } else if has(Bmc::Unreachable) {
        Bmc::Unreachable
    } else if has(Bmc::Unknown) || answers.is_empty() {
        Bmc::Unknown
    } else {
        Bmc::Off
    }
}

fn primitive(element: &BytesStart<'_>) -> Result<Option<Device>, String> {
    if attribute(element, "class")?.as_deref() != Some("stonith") {
        return Ok(None);
    }
    let text = |name| Ok::<_, String>(attribute(element, name)?.unwrap_or_default());
    Ok(Some(Device { id: text("id")?, agent: text("type")?, ..Device::default() }))
}

fn level(element: &BytesStart<'_>) -> Result<Option<Level>, String> {
    let Some(devices) = attribute(element, "devices")? else { return Ok(None) };
    let index = attribute(element, "index")?.and_then(|index| index.parse().ok()).unwrap_or(u32::MAX);
    let devices = devices.split(',').map(|id| id.trim().to_owned()).collect();
    Ok(Some(Level { target: attribute(element, "target")?, index, devices }))
}

impl Device {
    fn pair(&mut self, pair: &BytesStart<'_>, instance: bool, meta: bool) -> Result<(), String> {
        let (Some(name), Some(value)) = (attribute(pair, "name")?, attribute(pair, "value")?) else { return Ok(()) };
        if instance {
            self.parameters.insert(name, value);
        } else if meta && name == "target-role" {
            self.off = value.eq_ignore_ascii_case("stopped");
        }
        Ok(())
    }

    /// What the device calls the host; `None` if it is not for it, or that cannot be known.
    fn plug(&self, node: &str) -> Option<String> {
        let parameter = |name: &str| self.parameters.get(name).map(String::as_str);
        let (list, map) = (parameter("pcmk_host_list"), parameter("pcmk_host_map"));
        let mapped = map.and_then(|map| {
            let pairs = map.split([';', ' ', '\t', '\n']).filter_map(|pair| pair.split_once([':', '=']));
            { pairs }.find(|(name, _)| *name == node).map(|(_, plug)| plug.to_owned())
        });
        let listed = mapped.is_some()
            || list.is_some_and(|list| list.split([' ', ',', ';', '\t', '\n']).any(|word| word == node));
        let for_it = match parameter("pcmk_host_check") {
            Some("none") => true,
            Some("static-list") => listed,
            None if list.is_some() || map.is_some() => listed,
            _ => false,
        };
        for_it.then(|| mapped.unwrap_or_else(|| node.to_owned()))
    }

    /// What is written to the agent; `None` if it is not to be asked.
    fn question(&self, node: &str) -> Option<String> {
        let plug = self.plug(node)?;
        let name = self.agent.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
        let secret = self.parameters.values().any(|value| value.starts_with("lrm://"));
        let foreign = self.parameters.iter().any(|(name, value)| name.contains(['\n', '=']) || value.contains('\n'));
        let power = self.agent.starts_with("fence_") && !NOT_OF_POWER.contains(&self.agent.as_str());
        if self.off || secret || foreign || !name || !power {
            return None;
        }
        let own = |name: &str| self.parameters.get(name).map(String::as_str);
        let mut said: BTreeMap<&str, &str> = self
            .parameters
            .iter()
            .filter(|(name, _)| !name.starts_with("pcmk_") && !matches!(name.as_str(), "action" | "option"))
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        let fixed = ["plug", "port"].iter().any(|name| said.get(name).is_some_and(|value| *value != "dynamic"));
        match own("pcmk_host_argument") {
            Some("none") => {}
            Some(argument) if said.get(argument).is_some_and(|value| *value != "dynamic") => {}
            Some(argument) => drop(said.insert(argument, &plug)),
            None if fixed => {}
            None => drop(said.insert("plug", &plug)),
        }
        said.insert("nodename", node);
        said.insert("action", own("pcmk_status_action").unwrap_or("status"));
        Some(said.iter().map(|(name, value)| format!("{name}={value}\n")).collect())
    }

    fn ask(&self, node: &str, agents: &Path) -> Bmc {
        let Some(question) = self.question(node) else { return Bmc::Unknown };
        let mut command = Command::new(agents.join(&self.agent));
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        // It is not installed here.
        let Ok(mut child) = command.spawn() else { return Bmc::Unknown };
        if let Some(mut input) = child.stdin.take() {
            // An agent that does not read to the end says so by how it ends.
            let _ = input.write_all(question.as_bytes());
        }
        match wait(&mut child).and_then(|status| status.code()) {
            Some(0) => Bmc::On,
            Some(2) => Bmc::Off,
            _ => Bmc::Unreachable,
        }
    }
}

/// Wait for an agent, and end it and what it has started when it takes too long.
fn wait(child: &mut Child) -> Option<std::process::ExitStatus> {
    let until = Instant::now() + PATIENCE;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < until => thread::sleep(Duration::from_millis(20)),
            _ => {
                if let Ok(group) = i32::try_from(child.id()) {
                    let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
                }
                let _ = child.wait();
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests;
