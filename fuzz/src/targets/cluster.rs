//! `agents`, `ocf`, `crm-config`, `boards`: what the cluster's tools print, what an administrator writes, what a crash leaves.

use std::fs;

use ocf::Environment;
use ocf::notify::{Members, Notification};
use ocf::parameter::Parameters;
use understudy_agents::cluster as agents;
use understudy_boards::journal::{AfterCrash, Journal};
use understudy_crm::{check, cib as crm_cib, compile, crm, merge, pcs, xml};

use super::with_dir;
use crate::input::Input;

/// A CIB, for the agents and for the configuration tool.
pub fn cib(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Ok(cib) = agents::Cib::parse(&text) {
        let _ = cib.generations("understudy-generation-m1");
        let _ = cib.promotion_scores("vm-m1");
        let _ = (cib.clone_of("vm-m1"), cib.vmm_of("m1"), cib.veto("m1"));
    }
    if let Ok(element) = xml::Element::parse(&text) {
        // What was read can be written and read again.
        let printed = element.to_string();
        let again = xml::Element::parse(&printed).map(|e| e.to_string());
        assert_eq!(again.ok().as_deref(), Some(printed.as_str()));
        let _ = merge::merge(&element, &understudy_crm::model::Configuration::default());
    }
}

/// A policy, down to the three languages that it is said in.
pub fn policy(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let (policy, findings) = check::read(&text);
    for finding in &findings {
        let _ = finding.to_string();
    }
    if let Some(policy) = policy {
        let configuration = compile::compile(&policy);
        let document = crm_cib::document(&policy, &configuration);
        assert!(xml::Element::parse(&document.to_string()).is_ok());
        let _ = (crm::text(&configuration), pcs::script(&configuration));
    }
}

/// An agent's environment: notification lists, meta attributes, parameters.
pub fn environment(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let pairs = text.lines().filter_map(|line| line.split_once('='));
    let environment = Environment::from_pairs(pairs);
    let _ = Notification::from_environment(&environment).map(|n| (n.roles_now(), n.roles_after()));
    let _ = Members::from_environment(&environment).map(|m| m.promotes_elsewhere("n1"));
    let _ = (environment.timeout(), environment.interval(), environment.check_level(), environment.is_clone());
    let parameters = Parameters::new(environment);
    for name in understudy_agents::AGENTS {
        if let Some(agent) = understudy_agents::agent(name) {
            let _ = parameters.validate(&agent.description().parameters);
        }
    }
}

/// The first bytes of a journal, over one that a board has left.
pub fn journal(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let policy = if input.byte().is_multiple_of(2) { AfterCrash::Skip } else { AfterCrash::Repeat };
    let mut content = input.rest().to_vec();
    content.resize(4096 + 64, 0);
    // The checksums of both records, so that what is behind them is looked at too.
    for seal in [false, true] {
        if seal {
            for at in [0, 512] {
                let crc = crc32fast::hash(&content[at..at + 124]);
                content[at + 124..at + 128].copy_from_slice(&crc.to_le_bytes());
            }
        }
        with_dir(|dir| {
            if fs::write(dir.join("m.gps.board"), &content).is_ok() {
                let _ = Journal::open(dir, "m", "gps", 64, policy).map_err(|e| e.to_string());
            }
        });
    }
}
