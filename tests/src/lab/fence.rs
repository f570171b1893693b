//! `fence_lab`: the fence agent of the lab, asking the simulated BMC.
//!
//! The fence agent API: options as `key=value` lines on standard input, the result as exit code; `metadata` on standard
//! output. (ClusterLabs FenceAgentAPI.md)

use std::collections::HashMap;
use std::io::BufRead;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use understudy_protocol::control::call_once;

use super::bmc::{BmcRequest, FenceMode, LabStatus};
use super::net::{NODES, Plane};
use super::places;

/// "Off" is an answer, not an error: the API's exit code for it.
const STATUS_OFF: i32 = 2;
/// Longest wait for the BMC.
const BOUND: Duration = Duration::from_secs(40);

const METADATA: &str = r#"<?xml version="1.0" ?>
<resource-agent name="fence_lab" shortdesc="Fencing in Understudy's lab">
  <longdesc>Cuts the power of a node of the lab (SIGKILL to its process 1) and says so only when it is done.</longdesc>
  <parameters>
    <parameter name="action" unique="0" required="1">
      <getopt mixed="-o, --action=[action]" /><content type="string" default="off" />
      <shortdesc lang="en">Fencing action</shortdesc>
    </parameter>
    <parameter name="plug" unique="0" required="1" obsoletes="port">
      <getopt mixed="-n, --plug=[id]" /><content type="string" />
      <shortdesc lang="en">Name of the node</shortdesc>
    </parameter>
  </parameters>
  <actions>
    <action name="on" automatic="0" />
    <action name="off" />
    <action name="reboot" />
    <action name="status" />
    <action name="monitor" />
    <action name="list" />
    <action name="metadata" />
    <action name="validate-all" />
  </actions>
</resource-agent>
"#;

/// Run the agent with options from `input` (and `--action=…`/`-o …` arguments); the exit code.
pub fn run(arguments: &[String], input: &mut impl BufRead) -> Result<i32> {
    let mut options: HashMap<String, String> = HashMap::new();
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        let mut value_of = |option: &str| words.next().cloned().with_context(|| format!("{option} needs a value"));
        let (key, value) = match word.trim_start_matches('-').split_once('=') {
            Some((key, value)) => (key.to_string(), value.to_string()),
            None if word == "-o" => ("action".into(), value_of("-o")?),
            None if word == "-n" => ("plug".into(), value_of("-n")?),
            None => bail!("unknown argument {word}"),
        };
        options.insert(key, value);
    }
    if arguments.is_empty() {
        for line in input.lines() {
            if let Some((key, value)) = line?.split_once('=') {
                options.insert(key.trim().to_string(), value.trim().to_string());
            }
        }
    }
    // Older callers say `port` or `nodename`, and `option`.
    let option = |names: &[&str]| names.iter().find_map(|n| options.get(*n)).cloned();
    let action = option(&["action", "option"]).unwrap_or_else(|| "off".into());
    let plug = || option(&["plug", "port", "nodename"]).context("no node named: fence_lab needs plug=NODE");
    let ask = |request: &BmcRequest| call_once::<_, serde_json::Value>(places::bmc_socket(), request, BOUND);
    let status = || -> Result<LabStatus> {
        let status: LabStatus = serde_json::from_value(ask(&BmcRequest::Status)?)?;
        if status.is_deaf(&own_name()?) {
            bail!("the BMC cannot be reached: the management cable is pulled");
        }
        Ok(status)
    };
    match action.as_str() {
        "metadata" | "meta-data" => print!("{METADATA}"),
        "validate-all" => {}
        "list" => NODES.iter().for_each(|n| println!("{},", n.name)),
        "monitor" => drop(status()?),
        "status" => {
            let status = status()?;
            let plug = plug()?;
            let node = status.nodes.get(&plug).with_context(|| format!("there is no node {plug}"))?;
            let isolated = status.fence_mode == FenceMode::Fabric && node.cut.len() == Plane::ALL.len();
            if !node.on || isolated {
                return Ok(STATUS_OFF);
            }
        }
        "on" | "off" | "reboot" => {
            ask(&BmcRequest::Fence { action, node: plug()?, from: own_name()? })?;
        }
        other => bail!("fence_lab does not know the action \"{other}\""),
    }
    Ok(0)
}

fn own_name() -> Result<String> {
    Ok(nix::unistd::gethostname().context("finding this node's name")?.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fencing_without_a_node_or_with_an_unknown_action_fails_instead_of_guessing() {
        assert!(run(&[], &mut b"action=off\n".as_slice()).is_err());
        assert!(run(&[], &mut b"action=explode\nplug=n1\n".as_slice()).is_err());
    }
}
